#!/usr/bin/env bash
# Packs what a GPU machine without a network lacks, so that `benchmarks/gpu.py` runs there, in two archives of about 30 and
# 58 MB: docs/performance.md says how to use them.
#
#   benchmarks/pack.sh FOLDER     from the repository's root, on a machine with a network; up to ten minutes
#
# For CPython 3.12 on x86-64. What `there` names is taken to be on that machine already; tools, test servers, stubs, Ray's
# jars, RLlib, Serve and dashboard pages, MLflow's web page and boto's descriptions of other services are left out.
set -euo pipefail
out=$(realpath -m "$1"); pins=$(realpath constraints.txt)
there='^(nvidia-|cuda-|torch|triton|numpy|pandas|pyarrow|scipy|scikit-learn|timm|h5py|tifffile|matplotlib=|grpcio|pytest'
there+='|aiohappyeyeballs|aiohttp=|aiosignal|annotated-doc|anyio|attrs|certifi|charset|click|cloudpickle|contourpy|cycler'
there+='|filelock|fonttools|frozenlist|fsspec|h11|hf-xet|huggingface|idna|iniconfig|jinja2|joblib|kiwisolver|markdown-it'
there+='|markupsafe|mdurl|mpmath|msgpack|multidict|narwhals|networkx|packaging|pathspec|pillow|pluggy|prometheus_client'
there+='|propcache|protobuf|psutil|pygments|pyparsing|python-dateutil|pyyaml|requests|rich|safetensors|six|sympy'
there+='|threadpoolctl|tqdm|typing_extensions|urllib3|werkzeug|wrapt|yarl|zipp)'
tools='(stubs|^types-|^ruff|^mypy|^seaweedfs|^py-spy|^docker|^ast_serialize|^virtualenv|^distlib)'
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
grep -E '^[A-Za-z0-9_.-]+==' "$pins" | grep -viE "$there" | grep -viE "$tools" > "$work/pins.txt"
python3 -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --target "$work/site" -r "$work/pins.txt"
cd "$work/site"
rm -rf ray/jars ray/rllib ray/dashboard/client ray/cpp ray/llm ray/serve mlflow/server/js bin
find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts -exec rm -rf {} +
find . -name __pycache__ -prune -exec rm -rf {} +
mkdir -p "$out"
tar -cf - ray ray-*.dist-info | xz -3 -T0 > "$out/ray.tar.xz"
tar -cf - --exclude=./ray --exclude='./ray-*.dist-info' . | xz -3 -T0 > "$out/rest.tar.xz"
du -m "$out"/*.tar.xz

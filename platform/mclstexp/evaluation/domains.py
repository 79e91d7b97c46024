"""Spatial domains of a section, found from its expression alone, against a pathologist's labels.

As in mclSTExp's evaluation (2024, https://arxiv.org/abs/2407.08216): spots without a label are left out, the rest go
through PCA and k-means++; Leiden on a graph of nearest neighbours is added here. Smooth values make compact domains
whether they are right or not, so compare a prediction with the *smoothed* measured expression.

Shapes: N spots of one section, G genes, C principal components.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import igraph
import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import kneighbors_graph, radius_neighbors_graph

from mclstexp.data.schema import NO_LABEL
from mclstexp.errors import SourceError

NUM_COMPONENTS = 9
SEED = 0
KMEANS_STARTS = 10
GRAPH_NEIGHBOURS = 15
RESOLUTIONS = (1e-3, 1e2)
RESOLUTION_TRIES = 25
SMOOTHING_PITCHES = 1.57
"""Radius of smoothing in pitches, between √2 and √3: 8 neighbours on a square array, 6 on a hexagonal one."""
NO_PITCH = 100.0
"""Pitch of a lone spot, large enough to be seen when drawn."""
MEASURED, SMOOTHED = "measured", "smoothed measured"
UNDETERMINED = "undetermined"
_UNLABELLED = NO_LABEL | {UNDETERMINED}
NO_DOMAIN = -1
"""Domain of a spot without a label."""


@dataclass(frozen=True)
class Domains:
    """The domains of one expression matrix: int64 (N,) each, numbered from 0; NO_DOMAIN for spots without a label."""

    kmeans: np.ndarray
    leiden: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """Agreement of domains with labels."""

    ari: float
    """Adjusted Rand index: 1 is equal, 0 is chance."""
    nmi: float
    """Normalised mutual information (arithmetic mean), 0 to 1; not corrected for chance."""
    clusters: int
    """Number of domains."""


@dataclass(frozen=True)
class DomainComparison:
    """The domains of one section from measured and predicted expression, and their agreement with its labels."""

    table: pd.DataFrame
    """One row per expression matrix (measured, smoothed measured, each prediction). Columns: method, kmeans_ari,
    kmeans_nmi, kmeans_clusters, leiden_ari, leiden_nmi, leiden_clusters, num_labels, spots_used, spots_dropped."""
    domains: dict[str, Domains]
    """By method."""
    smoothing_radius_um: float
    smoothing_neighbours: float
    """Mean number of neighbours in a smoothed value, without the spot itself."""


@dataclass(frozen=True)
class Neighbourhoods:
    """The spots around each spot of a section, itself included."""

    graph: csr_array
    """(N, N), 1 where two spots are neighbours or the same."""
    radius: float
    """In the unit of the coordinates."""

    @property
    def num_neighbours(self) -> float:
        """Mean number of neighbours of a spot, without itself."""
        return self.graph.nnz / self.graph.shape[0] - 1

    def mean(self, expression: np.ndarray) -> np.ndarray:
        """Returns each spot's mean over itself and its neighbours, float64 (N, G)."""
        return (self.graph @ expression.astype(np.float64)) / self.graph.sum(axis=1)[:, None]


def compare_domains(
    labels: Sequence[str | None],
    xy_um: np.ndarray,
    measured: np.ndarray,
    predictions: Mapping[str, np.ndarray],
) -> DomainComparison:
    """Returns the domains of one section from each expression matrix, and their agreement with the labels.

    Spots without a label (see `is_labelled`) are dropped before PCA, and counted; smoothing uses them like all others.
    The number of domains to find is the number of different labels.

    Args:
        labels: a pathologist's label of each spot.
        xy_um: float (N, 2), spot centres in micrometres.
        measured: (N, G), normalised measured expression.
        predictions: (N, G) in the same unit, by method.

    Raises:
        SourceError: there are fewer than two different labels.
    """
    used = is_labelled(labels)
    kept = np.asarray(labels, object)[used].astype(str)
    num_labels = len(np.unique(kept))
    if num_labels < 2:
        raise SourceError(
            f"labels: {len(kept)} of {len(used)} spots have a label, {num_labels} different; domains need two. "
            "Leave `labels` empty in the section's row of the sample sheet"
        )
    smooth = neighbourhoods(xy_um)
    expression = {MEASURED: measured, SMOOTHED: smooth.mean(measured), **predictions}
    found = {method: find_domains(values[used], num_labels) for method, values in expression.items()}
    counts = {"num_labels": num_labels, "spots_used": int(used.sum()), "spots_dropped": int((~used).sum())}
    rows = [{"method": method} | _scores(kept, domains) | counts for method, domains in found.items()]
    whole = {method: Domains(_spread(each.kmeans, used), _spread(each.leiden, used)) for method, each in found.items()}
    return DomainComparison(pd.DataFrame(rows), whole, smooth.radius, smooth.num_neighbours)


def is_labelled(labels: Sequence[str | None]) -> np.ndarray:
    """Returns bool (N,): False for a label that is missing, empty, or NA, NaN or undetermined in any case."""
    return np.array([isinstance(label, str) and label.strip().lower() not in _UNLABELLED for label in labels], bool)


def agreement(labels: np.ndarray, domains: np.ndarray) -> Agreement:
    """Returns the agreement of domains with labels, both (N,); neither names nor order of the domains matter.

    ARI: Hubert and Arabie 1985, https://doi.org/10.1007/BF01908075. NMI: Strehl and Ghosh 2002,
    https://www.jmlr.org/papers/v3/strehl02a.html, normalised by the arithmetic mean of both entropies.
    """
    return Agreement(
        ari=float(adjusted_rand_score(labels, domains)),
        nmi=float(normalized_mutual_info_score(labels, domains)),
        clusters=len(np.unique(domains)),
    )


def find_domains(expression: np.ndarray, num_domains: int) -> Domains:
    """Returns the domains of spots (N, G) by k-means++ and by Leiden; one domain if all spots are equal."""
    components = principal_components(expression)
    if components.shape[1] == 0:
        return Domains(*np.zeros((2, len(expression)), np.int64))
    return Domains(kmeans_domains(components, num_domains), leiden_domains(components, num_domains))


def principal_components(expression: np.ndarray) -> np.ndarray:
    """Returns the spots' first principal components, float64 (N, C); genes are centred, not scaled.

    C is 9, as published, or less if there are fewer spots or fewer genes that vary.
    """
    varying = expression[:, (expression != expression[:1]).any(axis=0)].astype(np.float64)
    num = min(NUM_COMPONENTS, *varying.shape)
    return PCA(num, svd_solver="full").fit_transform(varying) if num else np.zeros((len(expression), 0))


def kmeans_domains(components: np.ndarray, num_domains: int) -> np.ndarray:
    """Returns the domains of spots (N, C) by k-means++ (Arthur and Vassilvitskii 2007), int64 (N,).

    The best of 10 starts, seed 0. There may be fewer domains if there are fewer different spots.
    """
    model = KMeans(num_domains, init="k-means++", n_init=KMEANS_STARTS, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different spots than domains: the count is reported
        return model.fit_predict(components).astype(np.int64)


def leiden_domains(components: np.ndarray, num_domains: int) -> np.ndarray:
    """Returns the domains of spots (N, C) by Leiden (Traag et al. 2019, https://arxiv.org/abs/1810.08473), int64 (N,).

    Modularity on the undirected graph that joins each spot with its 15 nearest. A higher resolution makes more domains,
    so the resolution is bisected on a log scale between 0.001 and 100 until the number is right; after 25 tries the
    nearest number is taken (the first among equals). No resolution gives fewer domains than the graph has separate
    parts. Each try starts with seed 0.
    """
    graph = _neighbour_graph(components)
    low, high = RESOLUTIONS
    tries = []
    for _ in range(RESOLUTION_TRIES):
        resolution = float(np.sqrt(low * high))
        domains = _leiden(graph, resolution)
        surplus = int(domains.max()) + 1 - num_domains
        tries.append((abs(surplus), domains))
        if surplus == 0:
            break
        low, high = (low, resolution) if surplus > 0 else (resolution, high)
    return min(tries, key=lambda each: each[0])[1]


def neighbourhoods(xy: np.ndarray) -> Neighbourhoods:
    """Returns the spots within 1.57 pitches of each spot (N, 2): 8 inside a square array, 6 inside a hexagonal one."""
    radius = SMOOTHING_PITCHES * spot_pitch(xy)
    graph = csr_array(radius_neighbors_graph(xy, radius, include_self=True))
    return Neighbourhoods(graph, radius)


def spot_pitch(xy: np.ndarray) -> float:
    """Returns the distance of neighbouring spots (N, 2), in their unit; `NO_PITCH` for a lone spot.

    It is the median over spots of the mean distance to the four nearest, which on a slightly rotated or stretched
    array says more than the nearest alone.
    """
    if len(xy) < 2:
        return NO_PITCH
    nearest = min(5, len(xy))
    return float(np.median(cKDTree(xy).query(xy, k=nearest)[0][:, 1:].mean(axis=1)))


def _scores(labels: np.ndarray, domains: Domains) -> dict[str, float]:
    return {
        f"{way}_{score}": value
        for way, found in vars(domains).items()
        for score, value in asdict(agreement(labels, found)).items()
    }


def _spread(domains: np.ndarray, used: np.ndarray) -> np.ndarray:
    whole = np.full(len(used), NO_DOMAIN, np.int64)
    whole[used] = domains
    return whole


def _neighbour_graph(components: np.ndarray) -> igraph.Graph:
    nearest = kneighbors_graph(components, min(GRAPH_NEIGHBOURS, len(components) - 1)).tocoo()
    edges = np.unique(np.sort(np.stack([nearest.row, nearest.col], axis=1), axis=1), axis=0)
    return igraph.Graph(n=len(components), edges=edges.tolist())


def _leiden(graph: igraph.Graph, resolution: float) -> np.ndarray:
    with _seeded_igraph():
        found = graph.community_leiden(objective_function="modularity", resolution=resolution, n_iterations=-1)
    return np.array(found.membership, np.int64)


@contextmanager
def _seeded_igraph() -> Iterator[None]:
    """Seeds igraph, which draws from one generator for the whole process, by default Python's own."""
    igraph.set_random_number_generator(random.Random(SEED))
    try:
        yield
    finally:
        igraph.set_random_number_generator(random)

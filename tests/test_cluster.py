"""Jobs submitted to a real two-node cluster that knows the token, S3 and MLflow, and nothing of this project."""

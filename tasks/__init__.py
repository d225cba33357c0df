"""One Prefect task module per stage; tracking.py is the only one that knows MLflow, and needs no Prefect."""

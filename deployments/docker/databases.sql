-- beside the database `prefect`, which the image makes
CREATE DATABASE mlflow;

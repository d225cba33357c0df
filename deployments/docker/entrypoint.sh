#!/bin/sh
# One setting, SRLM_AUTH=user:password (12 characters or more), closes both servers, and lets their clients in.
set -eu
if [ -n "${SRLM_AUTH:-}" ]; then
  export PREFECT_SERVER_API_AUTH_STRING="$SRLM_AUTH" PREFECT_API_AUTH_STRING="$SRLM_AUTH"
  export MLFLOW_TRACKING_USERNAME="${SRLM_AUTH%%:*}" MLFLOW_TRACKING_PASSWORD="${SRLM_AUTH#*:}"
  export MLFLOW_AUTH_ADMIN_USERNAME="${SRLM_AUTH%%:*}" MLFLOW_AUTH_ADMIN_PASSWORD="${SRLM_AUTH#*:}"
  : "${MLFLOW_FLASK_SERVER_SECRET_KEY:=$(python -c 'import secrets; print(secrets.token_hex(32))')}"
  export MLFLOW_FLASK_SERVER_SECRET_KEY
  # MLflow keeps its users where it is started, and the first password for ever: a new file has today's
  if [ "$1" = mlflow ] && [ -z "${MLFLOW_AUTH_CONFIG_PATH:-}" ]; then
    users=${SRLM_USERS:-$(mktemp -d)}
    mkdir -p -m 700 "$users" && rm -f "$users"/*
    printf '[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///%s/users.db\n' "$users" > "$users/auth.ini"
    export MLFLOW_AUTH_CONFIG_PATH="$users/auth.ini"
  fi
fi
# a server that is away for some minutes is waited for: eight tries, each twice as long after the last
export PREFECT_CLIENT_MAX_RETRIES="${PREFECT_CLIENT_MAX_RETRIES:-8}"
export PREFECT_CLIENT_RETRY_EXTRA_CODES="${PREFECT_CLIENT_RETRY_EXTRA_CODES:-500}"  # its database is away
# deployments/automations/restart.yaml listens for these
export PREFECT_FLOWS_HEARTBEAT_FREQUENCY="${PREFECT_FLOWS_HEARTBEAT_FREQUENCY:-30}"
exec "$@"

#!/bin/sh
# What a Prefect server needs before the first run; every line may be run again.
set -eu
prefect work-pool inspect srlm > /dev/null 2>&1 || prefect --no-prompt work-pool create srlm --type process
for queue in gpu; do
  prefect work-queue inspect "$queue" --pool srlm > /dev/null 2>&1 || prefect work-queue create "$queue" --pool srlm
done
# campaigns hold a slot for each of their replicas' devices: a limit that is missing stops them
prefect gcl inspect gpu > /dev/null 2>&1 || prefect gcl create gpu --limit "${SRLM_GPUS:-1}"
prefect gcl inspect cpu > /dev/null 2>&1 || prefect gcl create cpu --limit "${SRLM_CPU_CAMPAIGNS:-10}"
prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
# settings that a recipe cannot work with are refused by its form; `prefect deploy` itself knows single fields alone
python -m flows.clashes

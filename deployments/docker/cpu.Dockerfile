# Servers and CPU workers: docker build -f deployments/docker/cpu.Dockerfile -t srlm-cpu:0.1.0 .
FROM python:3.11.14-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git libnuma1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 srlm \
 && mkdir -p /srlm/runs /srlm/artifacts && chown -R srlm:srlm /srlm
WORKDIR /srlm
# the pinned set first: it changes rarely, and is most of the image
COPY requirements/cpu.lock requirements/
RUN grep '^torch==' requirements/cpu.lock > /tmp/torch.txt \
 && pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu -r /tmp/torch.txt \
 && pip install --no-cache-dir --no-deps -r requirements/cpu.lock
COPY --chown=srlm:srlm . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
USER srlm
ENV DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false VLLM_NO_USAGE_STATS=1 SRLM_ROOT=/srlm/runs
ENTRYPOINT ["sh", "/srlm/deployments/docker/entrypoint.sh"]
CMD ["srlm", "doctor"]

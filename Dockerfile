# The command line in an image, for a CPU, NVIDIA GPUs or TPUs:
#   docker build --build-arg ACCELERATOR=cuda --tag ping-llm:cuda .
FROM python:3.12-slim

ARG ACCELERATOR=cpu

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY ping_llm ping_llm
RUN case "$ACCELERATOR" in \
        cpu) extra="" ;; \
        cuda|tpu) extra="[$ACCELERATOR]" ;; \
        *) echo "ACCELERATOR=$ACCELERATOR is not one of cpu, cuda, tpu" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir ".$extra"

ENTRYPOINT ["ping-llm"]

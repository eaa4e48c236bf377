# The worker: what jobs on GPU nodes run in. Two environments, because vLLM pins torch and fastapi to versions of its own:
# /opt/montessori trains (DeepSpeed) and measures influence, and comes first on PATH; /opt/generation has vLLM.
#
#   docker build --file docker/worker.Dockerfile --tag montessori-worker .
#
# Built by the Makefile's own steps from requirements/worker.lock and requirements/generation.lock. CUDA's compiler stays in the image:
# DeepSpeed and vLLM's kernels are compiled where they are first used. It is of the CUDA that the locked torch is built for.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS python
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make python3-dev python3-venv g++ ninja-build \
 && rm -rf /var/lib/apt/lists/*

FROM python AS build
WORKDIR /src
COPY . .
RUN make install-worker VENV=/opt/montessori && make install-generation VENV=/opt/generation

FROM python
# The base image has a user 1000 of its own.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 montessori && install --directory --owner montessori /runs /home/montessori/.cache
COPY --from=build /opt/montessori /opt/montessori
COPY --from=build /opt/generation /opt/generation
ENV PATH=/opt/montessori/bin:$PATH CUDA_HOME=/usr/local/cuda PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
USER 1000
WORKDIR /runs
CMD ["python", "-c", "import torch; print(torch.__version__, torch.cuda.device_count(), 'GPUs')"]

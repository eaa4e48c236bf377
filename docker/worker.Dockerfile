# The image of jobs on GPU nodes. It has two environments, because vLLM pins other versions of torch and fastapi:
# /opt/montessori for training (DeepSpeed) and influence, first on PATH, and /opt/generation for vLLM.
#
#   docker build --file docker/worker.Dockerfile --tag montessori-worker .
#
# It is built by make from requirements/worker.lock and requirements/generation.lock. The image keeps CUDA's compiler, because
# DeepSpeed and vLLM compile kernels at first use. The CUDA version is that of the locked torch.
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
# The base image already has a user 1000.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 montessori && install --directory --owner montessori /runs /home/montessori/.cache
COPY --from=build /opt/montessori /opt/montessori
COPY --from=build /opt/generation /opt/generation
ENV PATH=/opt/montessori/bin:$PATH CUDA_HOME=/usr/local/cuda PYTHONUNBUFFERED=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
USER 1000
WORKDIR /runs
CMD ["python", "-c", "import torch; print(torch.__version__, torch.cuda.device_count(), 'GPUs')"]

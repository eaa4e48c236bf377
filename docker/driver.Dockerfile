# The driver image, without torch: the command line, and Prefect's server, workers and deployments.
#
#   docker build --file docker/driver.Dockerfile --tag montessori-driver .
#
# It is built by `make install-driver` from requirements/driver.lock.
FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make install-driver PYTHON=python3 VENV=/opt/montessori

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 1000 montessori && install --directory --owner montessori /runs
COPY --from=build /opt/montessori /opt/montessori
ENV PATH=/opt/montessori/bin:$PATH PYTHONUNBUFFERED=1 PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
USER 1000
WORKDIR /runs
CMD ["montessori", "--help"]

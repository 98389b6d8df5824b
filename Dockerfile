# Images of distckpt for CPU, CUDA and TPU machines:
#
#   docker build --target cpu  -t distckpt:0.1.0-cpu  .
#   docker build --target cuda -t distckpt:0.1.0-cuda .
#   docker build --target xla  -t distckpt:0.1.0-xla  .
#
# BASE_IMAGE is any image with Python 3.10 to 3.13 as `python`. torch's CUDA wheels bring CUDA with them, so a GPU machine
# needs a driver and nothing more: docker run --gpus all --shm-size 2g. On a TPU VM: docker run --privileged --net host.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY constraints-dev.txt ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir -c constraints-dev.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY distckpt distckpt
COPY backends backends
RUN /opt/build/bin/python -m hatchling build -t wheel -d /dist

# What the three have in common: no root, a home to write to, the launch scripts, and a doctor.
FROM ${BASE_IMAGE} AS base
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/distckpt \
    USER=distckpt \
    OMP_NUM_THREADS=1 \
    PYTHONUNBUFFERED=1
WORKDIR /home/distckpt
RUN python -m venv /opt/venv && chmod 1777 /home/distckpt
WORKDIR /opt/distckpt
COPY constraints-dev.txt constraints-xla.txt ./
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["distckpt", "doctor", "--device", "cpu"]
CMD ["distckpt", "doctor"]

FROM base AS cpu
# the index of torch's wheels without CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints-dev.txt --index-url "$TORCH_INDEX" torch
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir -c constraints-dev.txt /dist/*.whl rich tyro plotille numpy
COPY launch launch
USER 10001:10001

FROM base AS cuda
RUN pip install --no-cache-dir -c constraints-dev.txt torch
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir -c constraints-dev.txt /dist/*.whl rich tyro plotille numpy
COPY launch launch
USER 10001:10001

FROM base AS xla
ENV PJRT_DEVICE=TPU
RUN pip install --no-cache-dir -c constraints-xla.txt torch torch-xla
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir -c constraints-xla.txt /dist/*.whl rich tyro plotille numpy
COPY launch launch
USER 10001:10001

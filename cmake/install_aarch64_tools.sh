#!/bin/sh
# Installs the cross compiler and the emulator of `make test-aarch64` where that is possible.
set -eu
packages="g++-aarch64-linux-gnu qemu-user"
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "rnn_ext: test-aarch64 needs the Debian packages $packages; install them as root" >&2
  exit 1
fi
echo "Installing $packages"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null

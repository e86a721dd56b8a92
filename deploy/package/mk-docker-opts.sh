#!/bin/sh
# For units that call Go flannel's script of this name.
exec @SBIN@/flanneld docker-opts "$@"

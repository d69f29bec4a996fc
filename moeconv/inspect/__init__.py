"""`moeconv inspect`: describes a checkpoint from its headers."""

from moeconv.callable_package import make_callable

make_callable(__name__)

"""`moeconv verify`: checks that a checkpoint is complete, that it fits its family, and on request that it runs."""

from moeconv.callable_package import make_callable

make_callable(__name__)

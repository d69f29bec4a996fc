"""`moeconv.tune(...)` is `moeconv.api.tune`, whether or not this package was imported before."""

from moeconv.callable_package import make_callable

make_callable(__name__)

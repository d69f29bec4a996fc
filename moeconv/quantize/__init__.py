"""Decide how experts are packed: a format and a scheme in, a Plan with exact sizes out."""

from moeconv.callable_package import make_callable

make_callable(__name__)

"""Decides which experts are removed: takes a criterion and what it needs, and makes a Plan."""

from moeconv.callable_package import make_callable

make_callable(__name__)

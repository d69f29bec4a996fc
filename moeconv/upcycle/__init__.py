"""Decide how a dense checkpoint becomes a Mixture-of-Experts: headers and parameters in, a Plan out."""

from moeconv.callable_package import make_callable

make_callable(__name__)

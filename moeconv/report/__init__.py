"""Looking at checkpoints: what one is, whether its bytes and structure are what they should be."""

from moeconv.callable_package import make_callable

make_callable(__name__)

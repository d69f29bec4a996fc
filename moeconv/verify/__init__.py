"""Is a checkpoint whole, of its family, and does it run?"""

from moeconv.callable_package import make_callable

make_callable(__name__)

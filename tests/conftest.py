"""What all tests share."""

import os

from hypothesis import settings

# With CI=true Hypothesis loads its own profile: the same examples in every run, no deadlines. Here: new examples each
# time, and no deadlines either, since a busy machine isn't a bug.
settings.register_profile("local", deadline=None, print_blob=True)
if not os.environ.get("CI"):
    settings.load_profile("local")

"""Settings of the whole test suite."""

from hypothesis import settings

# A time limit per example would measure the machine's other load, not our code. The same examples at every run, so that a
# commit passes or fails; --hypothesis-profile=search looks for new ones.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("reproducible")

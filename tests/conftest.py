"""Settings of the whole test suite."""

from hypothesis import settings

# A time limit per example would measure the machine's other load, not our code.
settings.register_profile("default-without-deadline", deadline=None)
settings.load_profile("default-without-deadline")

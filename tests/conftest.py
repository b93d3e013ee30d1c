"""One Hypothesis profile for every test: no deadline, and the same cases on every run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "stabletx",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("stabletx")

"""Order in which the files of tests begin when they run side by side: those that take longest first.

A file is run by one process. One that takes minutes and begins last lets the others wait for it, and files with few
tests, which pytest-xdist would take last, are mostly those that start servers, hosts and brokers.
"""

LONGEST = (
    "tests/fleet/server/test_the_day_after.py",
    "tests/fleet/cli/test_dryrun.py",
    "tests/fleet/cli/test_sizes.py",
    "tests/fleet/server/test_hard_rollouts.py",
    "tests/fleet/server/test_atomic_sets.py",
    "tests/fleet/server/test_effective.py",
    "tests/fleet/server/test_damaged_files.py",
    "tests/agent/test_damaged_store.py",
    "tests/agent/host/test_shared_ingress.py",
    "tests/agent/host/test_life.py",
    "tests/fleet/server/test_secrets.py",
    "tests/fleet/server/test_bad_messages.py",
    "tests/fleet/cli/test_keys.py",
    "tests/agent/host/test_escape.py",
    "tests/fleet/server/test_evidence.py",
    "tests/fleet/server/test_rollout_meaning.py",
    "tests/agent/host/test_killed_in_a_swap.py",
    "tests/fleet/cli/test_component_check.py",
    "tests/agent/report/test_diagnose.py",
    "tests/agent/test_starts.py",
    "tests/agent/host/test_component_check.py",
    "tests/agent/host/test_slow_clients.py",
    "tests/fleet/server/test_rollout_end_to_end.py",
    "tests/fleet/server/test_operator_api.py",
    "tests/house/test_files.py",
    "tests/fleet/server/test_broker_memory.py",
    "tests/fleet/server/test_clock.py",
    "tests/fleet/server/test_group_plan.py",
    "tests/fleet/cli/test_listening.py",
    "tests/fleet/cli/test_serve.py",
    "tests/fleet/server/test_enrolment.py",
    "tests/agent/test_cli.py",
    "tests/agent/host/test_hostile.py",
    "tests/deploy/test_packages.py",
    "tests/agent/test_surroundings.py",
    "tests/e2e/test_bad_input.py",
    "tests/fleet/simulator/test_invariants.py",
    "tests/agent/host/test_health_check.py",
    "tests/agent/host/supervisor/test_wall_clock.py",
    "tests/fleet/server/test_device_budget.py",
    "tests/agent/host/test_guests.py",
    "tests/agent/host/worker/test_streaming.py",
    "tests/house/test_support.py",
    "tests/house/test_baseline.py",
    "tests/agent/link/test_ways_out.py",
    "tests/agent/host/supervisor/test_shared_workers.py",
    "tests/agent/update/test_lost_files.py",
    "tests/fleet/cli/test_withdraw.py",
    "tests/agent/host/supervisor/test_state_transfer.py",
    "tests/fleet/cli/test_evidence.py",
    "tests/fleet/component/test_compose.py",
    "tests/fleet/admin/test_recovery.py",
    "tests/agent/link/test_https.py",
    "tests/signing/test_trusted_metadata.py",
    "tests/agent/host/test_replies.py",
    "tests/agent/host/test_request_path.py",
    "tests/agent/host/test_confined_imports.py",
    "tests/components/test_demo_components.py",
    "tests/signing/test_hash_bins.py",
    "tests/fleet/server/test_brokers.py",
    "tests/fleet/server/test_exchange.py",
    "tests/agent/host/test_host_secrets.py",
    "tests/fuzz/test_fuzz.py",
    "tests/agent/host/http/test_http_fuzz.py",
    "tests/signing/test_keys.py",
    "tests/agent/host/test_wasi_http.py",
    "tests/fleet/protocol/test_topics.py",
    "tests/agent/host/worker/test_native_channel.py",
    "tests/agent/update/test_live_keys.py",
    "tests/agent/update/test_atomic_sets.py",
    "tests/agent/report/test_check.py",
)
"""By the time that each took when all ran (`pytest --durations=0`); the others follow as they are found."""


_PLACES = {file: place for place, file in enumerate(LONGEST)}


def place(test):
    """Return the place of a test's file; one for all that are not named."""
    return _PLACES.get(test.split("::")[0], len(_PLACES))

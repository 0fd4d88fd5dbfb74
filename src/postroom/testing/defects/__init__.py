"""Brokers with one planted defect each: they prove that the conformance suite can fail.

Each wraps a sound broker and breaks one promise. ``DEFECTS`` names the tests that must go red for it; an author of a
suite or a broker may plant them in their own: ``DefectiveHarness(my_harness, DropsAPublish)``.
"""

from __future__ import annotations

from postroom.testing.defects import delivering, keeping
from postroom.testing.defects.wrapper import DefectiveBroker, DefectiveConsumer, DefectiveHarness

DEFECTS: dict[type[DefectiveBroker], tuple[str, ...]] = {
    keeping.DropsAPublish: (
        "publish.test_publish_subscribe",
        "concurrency.test_concurrent_subscribe",
        "consume.test_room_for_more_than_there_can_be",
    ),
    keeping.AltersHeaders: ("publish.test_publish_subscribe", "limits.test_unicode_everywhere", "fan_out.test_filters"),
    delivering.DuplicatesADelivery: ("consume.test_no_ack", "concurrency.test_concurrent_subscribe"),
    keeping.ReordersKeys: ("ordering.test_one_of_a_key_at_a_time", "ordering.test_order_under_failures"),
    delivering.AcksEarly: ("settle.test_resend_on_error", "fencing.test_a_lease_that_ends_frees_the_message"),
    delivering.NeverRedelivers: ("settle.test_a_retry_counts", "concurrency.test_nothing_is_lost_among_failures"),
    delivering.HasNoFencing: (
        "fencing.test_a_frozen_holder_cannot_settle",
        "fencing.test_a_refusal_does_not_affect_the_batch",
    ),
    delivering.SettlesTwice: ("settle.test_settled_once", "settle.test_settled_twice_in_one_batch"),
    delivering.ExtendsNothing: ("fencing.test_extending_keeps_the_lease", "fencing.test_extend_tells_what_is_lost"),
    delivering.DeliversEarly: ("timing.test_never_early", "timing.test_a_retry_waits_its_delay"),
    keeping.ForgetsHistory: (
        "dead_letters.test_a_dead_letter_is_complete",
        "dead_letters.test_history_survives_redrive",
    ),
    keeping.LeaksSubscriptions: ("fan_out.test_filters", "retention.test_earliest_respects_pattern_and_filter"),
    keeping.RedrivesTwice: ("dead_letters.test_redrive", "dead_letters.test_redriven_once"),
    keeping.StatusGoesBackwards: ("jobs.test_the_life_of_a_job", "jobs.test_final_states"),
    keeping.IgnoresDedup: (
        "deduplication.test_one_key_one_message",
        "deduplication.test_another_payload_is_a_conflict",
    ),
    keeping.IgnoresUniqueness: (
        "unique.test_unique_until_done",
        "unique.test_unique_until_started",
        "unique.test_unique_among_many_publishers",
        "unique.test_unique_survives_a_restart",
    ),
    keeping.HoldsKeysForGood: ("unique.test_unique_until_done", "unique.test_unique_until_started"),
    keeping.ReplacesNothing: ("unique.test_replace", "unique.test_replace_within_a_batch"),
    keeping.IgnoresExpiry: ("timing.test_the_expired_is_never_delivered", "jobs.test_an_expired_job_says_so"),
    keeping.IgnoresPriority: ("timing.test_higher_priority_first", "timing.test_priority_survives_a_retry"),
    keeping.IgnoresLimits: ("publish.test_a_full_queue_refuses", "fan_out.test_a_full_subscription_refuses_for_all"),
    keeping.RetainsNothing: ("retention.test_new_subscriber_receives_old_messages", "retention.test_replay"),
    delivering.ForgetsDeaths: (
        "fencing.test_a_killer_does_not_loop",
        "fencing.test_what_was_not_started_does_not_count",
    ),
    delivering.HoldsOnAtClose: ("lifecycle.test_closing_a_consumer_releases_at_once",),
    keeping.PurgesNothing: ("jobs.test_a_purged_job_is_cancelled",),
    keeping.PurgesTheDead: ("consume.test_purge_takes_only_what_waits",),
    delivering.GivesTooMany: ("consume.test_no_more_than_asked_for",),
    keeping.MangledBodies: (
        "limits.test_an_empty_body",
        "limits.test_every_byte",
        "limits.test_large_headers",
        "limits.test_a_large_body",
    ),
    delivering.NeverWaits: (
        "consume.test_a_message_of_another_broker_wakes_the_waiting",
        "consume.test_receive_waits_no_longer_than_asked",
        "consume.test_receive_returns_with_the_first",
        "lifecycle.test_concurrent_close",
    ),
    delivering.NeverLooksIn: ("consume.test_looking_in_without_waiting",),
    delivering.MixesAnswers: (
        "publish.test_publishing_nothing_is_fine",
        "publish.test_a_batch_published_by_many_at_once",
        "settle.test_settling_nothing_is_fine",
    ),
    keeping.SwallowsErrors: (
        "consume.test_unknown_subscription_is_refused",
        "fan_out.test_a_subscribed_topic_cannot_become_a_queue",
        "publish.test_unknown_topic_is_refused",
        "publish.test_what_is_not_supported_is_refused",
    ),
    keeping.ConfusesStats: ("consume.test_stats_of_an_empty_subscription",),
    keeping.RetainsEverything: (
        "retention.test_latest_gets_none_of_the_retained",
        "retention.test_without_retention_there_is_nothing_earlier",
    ),
    keeping.MistakesThePast: ("timing.test_a_time_that_is_over_is_now",),
    delivering.RefusesWhatMayExpire: ("timing.test_expiry_does_not_end_what_runs",),
    keeping.ClaimsALimit: ("limits.test_the_declared_size_is_the_limit",),
    keeping.KnowsEveryJob: ("jobs.test_unknown_jobs", "lifecycle.test_after_close_there_is_no_status"),
    keeping.NeedsItsConnection: ("lifecycle.test_a_constructor_does_no_io",),
}
"""Each defect, and tests of the suite that must fail for it."""

__all__ = ["DEFECTS", "DefectiveBroker", "DefectiveConsumer", "DefectiveHarness"]

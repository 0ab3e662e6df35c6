"""What a client of OpenAI's API relies on, point by point, and the tests that would fail without it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent

ADDRESSES, REQUESTS, WHOLE, STREAMS = "test_v1_addresses", "test_v1_requests", "test_v1_whole", "test_v1_streams"
LOSSES, LEAVING, REPEATS, BROWSERS = "test_v1_losses", "test_v1_leaving", "test_v1_repeats", "test_v1_browsers"
MATRIX, EVENTS, PYTHON, NODE, LITELLM = (
    "test_v1_matrix",
    "test_sse",
    "test_openai_sdk",
    "test_openai_node",
    "test_litellm",
)

#: Each point of the checklist: what it is about, and (file, test) for it.
CHECKLIST: dict[int, tuple[str, tuple[tuple[str, str], ...]]] = {
    1: (
        "addresses",
        (
            (ADDRESSES, "test_every_address_answers_with_and_without_a_slash_and_others_are_an_error_object"),
            (BROWSERS, "test_options_says_what_an_address_takes_and_head_is_a_get_without_its_body"),
        ),
    ),
    2: (
        "the error object",
        (
            (ADDRESSES, "test_every_address_answers_with_and_without_a_slash_and_others_are_an_error_object"),
            (WHOLE, "test_a_refusal_of_the_model_server_is_passed_on_in_one_form"),
        ),
    ),
    3: (
        "types and codes",
        (
            (ADDRESSES, "test_a_store_that_takes_nothing_is_503_and_a_bug_is_500"),
            (ADDRESSES, "test_a_task_that_every_worker_fails_is_502_with_every_reason_and_one_too_late_504"),
            (PYTHON, "test_every_failure_is_the_sdks_right_class"),
            (NODE, "test_every_failure_is_the_sdks_right_class"),
            (LITELLM, "test_every_failure_is_litellms_right_class"),
        ),
    ),
    4: (
        "what a retry cannot cure",
        (
            (REQUESTS, "test_a_request_of_the_wrong_shape_is_400_and_names_the_parameter"),
            (PYTHON, "test_the_sdk_does_not_try_again_where_that_cannot_help"),
        ),
    ),
    5: (
        "when to come back",
        (
            (ADDRESSES, "test_the_time_to_come_back_is_that_until_a_place_is_free_as_far_as_anyone_knows"),
            (ADDRESSES, "test_a_full_queue_is_429_with_a_time_to_come_back"),
            (MATRIX, "test_a_plain_client"),
        ),
    ),
    6: ("no 409", ((ADDRESSES, "test_no_failure_looks_like_a_lock_which_sdks_would_try_again"),)),
    7: (
        "ids of requests",
        (
            (ADDRESSES, "test_every_answer_has_an_id_of_ours_and_gives_the_client_its_own_back"),
            (STREAMS, "test_a_stream_is_one_answer_with_one_id_its_role_once_and_its_end_once"),
        ),
    ),
    8: (
        "headers that explain",
        (
            (WHOLE, "test_a_whole_answer_has_our_id_and_the_clients_name_and_says_who_gave_it"),
            (ADDRESSES, "test_what_is_noted_for_a_request_stands_on_its_answer_whatever_that_is"),
            (BROWSERS, "test_a_page_of_a_named_origin_may_ask_first_and_read_every_header_that_explains"),
        ),
    ),
    9: (
        "ids and names of answers",
        ((WHOLE, "test_a_whole_answer_has_our_id_and_the_clients_name_and_says_who_gave_it"),),
    ),
    10: (
        "headers of streams",
        ((STREAMS, "test_a_stream_is_one_answer_with_one_id_its_role_once_and_its_end_once"),),
    ),
    11: (
        "frames",
        (
            (EVENTS, "test_a_stream_is_the_same_however_it_was_cut"),
            (STREAMS, "test_a_malformed_event_is_left_out_and_a_torn_one_never_sent"),
        ),
    ),
    12: (
        "one answer, its role once",
        (
            (STREAMS, "test_a_stream_is_one_answer_with_one_id_its_role_once_and_its_end_once"),
            (PYTHON, "test_the_sdks_own_helper_reads_a_stream_to_its_end"),
        ),
    ),
    13: (
        "reasons of an end",
        (
            (WHOLE, "test_an_answers_end_is_said_in_words_that_clients_know"),
            (EVENTS, "test_an_end_is_said_once_and_in_words_that_clients_know"),
        ),
    ),
    14: (
        "calls of tools",
        (
            (EVENTS, "test_a_call_of_a_tool_begins_with_all_that_names_it_and_goes_on_with_pieces_of_its_arguments"),
            (STREAMS, "test_tools_are_told_in_fragments_that_clients_can_glue"),
            (WHOLE, "test_calls_of_tools_are_whole_and_their_arguments_are_text"),
            (PYTHON, "test_a_tool_is_called_whole_and_in_pieces"),
            (NODE, "test_a_tool_is_called_whole_and_in_pieces"),
            (LITELLM, "test_a_tool_is_called_whole_and_in_pieces"),
        ),
    ),
    15: (
        "usage of streams",
        ((STREAMS, "test_usage_is_always_asked_of_the_engine_and_comes_last_to_those_who_asked"),),
    ),
    16: (
        "usage in numbers",
        (
            (WHOLE, "test_usage_is_told_of_every_whole_answer_in_whole_numbers_and_marked_where_it_is_guessed"),
            (STREAMS, "test_usage_that_no_engine_tells_is_guessed_from_the_text_and_marked"),
        ),
    ),
    17: (
        "signs of life",
        (
            (STREAMS, "test_a_silent_stream_is_kept_alive_from_the_start_and_its_loss_is_still_mended"),
            (PYTHON, "test_a_stream_that_falls_silent_although_it_is_kept_alive_is_not_repeated"),
        ),
    ),
    18: (
        "the head is held",
        (
            (
                STREAMS,
                "test_an_engine_that_fails_in_its_stream_is_a_status_before_the_first_event_and_a_frame_after_it",
            ),
            (LOSSES, "test_a_loss_before_the_first_event_is_invisible_and_after_it_the_stream_says_so"),
        ),
    ),
    19: (
        "whole answers that take long",
        (
            (WHOLE, "test_a_whole_answer_that_takes_long_is_kept_alive_with_blank_lines"),
            (WHOLE, "test_an_error_behind_blank_lines_is_in_the_body_and_breaks_off_for_who_did_not_ask_for_them"),
        ),
    ),
    20: (
        "a stream that fails",
        (
            (LOSSES, "test_an_answer_that_cannot_be_continued_says_why"),
            (STREAMS, "test_a_failure_after_the_status_went_out_is_a_frame"),
            (PYTHON, "test_a_cut_stream_raises_and_does_not_look_whole"),
            (NODE, "test_a_cut_stream_raises_and_does_not_look_whole"),
        ),
    ),
    21: (
        "whole events only",
        (
            (STREAMS, "test_a_malformed_event_is_left_out_and_a_torn_one_never_sent"),
            (EVENTS, "test_what_was_cut_off_anywhere_gives_whole_events_and_is_whole_only_with_its_finish_reason"),
            (EVENTS, "test_no_event_of_an_engine_breaks_the_stream_or_those_after_it"),
        ),
    ),
    22: (
        "clients that leave",
        (
            (LEAVING, "test_a_client_that_leaves_ends_its_task_at_once"),
            (PYTHON, "test_the_model_server_stops_computing_when_the_client_leaves"),
            (NODE, "test_the_model_server_stops_computing_when_the_client_leaves"),
            (LITELLM, "test_the_model_server_stops_computing_when_the_client_leaves"),
        ),
    ),
    23: (
        "what is changed for engines",
        (
            (REQUESTS, "test_a_request_of_the_wrong_shape_is_400_and_names_the_parameter"),
            (REQUESTS, "test_the_developers_words_are_the_systems_to_engines_and_nothing_else_of_the_messages_changes"),
            (REQUESTS, "test_the_newer_limit_of_tokens_counts_and_engines_get_it_by_both_names"),
            (REQUESTS, "test_an_empty_list_of_tools_is_left_out_and_nothing_else_changes"),
        ),
    ),
    24: (
        "what is passed on",
        ((REQUESTS, "test_what_need_not_change_reaches_the_model_server_byte_for_byte"),),
    ),
    25: (
        "embeddings",
        (
            (WHOLE, "test_completions_and_embeddings_have_their_own_shapes"),
            (PYTHON, "test_completions_embeddings_and_the_list_of_models"),
        ),
    ),
    26: (
        "models",
        (
            (ADDRESSES, "test_models_are_listed_as_the_sdk_reads_them"),
            (ADDRESSES, "test_a_model_never_seen_is_404_and_one_that_left_is_503_but_still_listed"),
        ),
    ),
    27: (
        "requests that are sent again",
        (
            (REPEATS, "test_a_client_that_lost_its_patience_and_asks_again_gets_the_first_runs_answer"),
            (REPEATS, "test_a_stream_that_is_asked_for_again_comes_from_its_beginning_and_goes_on"),
            (REPEATS, "test_a_named_request_is_answered_the_same_again_and_its_name_stands_for_it_alone"),
            (PYTHON, "test_a_request_that_the_sdk_repeats_after_its_timeout_runs_once"),
            (NODE, "test_a_request_that_the_sdk_repeats_after_its_timeout_runs_once"),
            (LITELLM, "test_a_request_that_is_repeated_after_its_timeout_runs_once"),
        ),
    ),
    28: (
        "a client's own patience",
        (
            (REQUESTS, "test_a_client_with_little_patience_is_kept_alive_more_often"),
            (REQUESTS, "test_what_clients_say_of_themselves_is_read_and_nonsense_is_not"),
            (WHOLE, "test_blank_lines_come_within_a_third_of_what_the_client_waits"),
        ),
    ),
    29: (
        "plain HTTP",
        (
            (BROWSERS, "test_a_page_of_a_named_origin_may_ask_first_and_read_every_header_that_explains"),
            (BROWSERS, "test_options_says_what_an_address_takes_and_head_is_a_get_without_its_body"),
            (BROWSERS, "test_one_connection_carries_one_request_after_another"),
            (BROWSERS, "test_a_client_that_waits_to_be_told_to_go_on_is_told_or_refused"),
            (REQUESTS, "test_a_body_that_is_too_large_or_encoded_is_refused"),
        ),
    ),
    30: ("keys", ((ADDRESSES, "test_a_key_comes_in_any_of_three_headers_and_a_wrong_one_is_401"),)),
    31: (
        "everything that can go wrong",
        ((MATRIX, "test_a_plain_client"), (MATRIX, "test_the_python_sdk"), (MATRIX, "test_the_node_sdk")),
    ),
}
POINTS = 31


def test_every_point_has_a_test() -> None:
    assert sorted(CHECKLIST) == list(range(1, POINTS + 1))
    assert all(tests for _, tests in CHECKLIST.values())


@pytest.mark.parametrize("file", sorted({file for _, tests in CHECKLIST.values() for file, _ in tests}))
def test_every_test_that_is_named_is_there(file: str) -> None:
    tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    named = {test for _, tests in CHECKLIST.values() for in_file, test in tests if in_file == file}
    assert named <= there

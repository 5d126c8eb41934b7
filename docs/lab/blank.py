"""Can you write it yourself? A copy of the project without the body of one function.

    python docs/lab/blank.py                            lists what can be left out
    python docs/lab/blank.py gae --out out/gae          leaves out generalised advantage estimation

Signature and docstring stay: they are all you need. What you write is judged by tests that the
project has anyway, most of them numbers worked out by hand.
"""
import argparse
import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]                 # the project
# name, FILE.function, the tests that judge it: tests/test_FILE.py::test_...
TABLE = """
attention-mask      model.attention_mask       masks_by_hand the_future_is_invisible
attention           model.Attention.forward    attention_by_hand
positions           model.segment_positions    positions_start_again_with_each_document
top-p               model.keep_likely          top_k_top_p_and_temperature_by_hand
next-token-loss     pretrain.next_token_loss   next_token_loss_by_hand
split-rows          pretrain.split_rows        rows_are_split_by_hand
accumulation        pretrain.backward          accumulated_gradients_are_those_of_the_whole_batch
muon                pretrain.orthogonalize     orthogonalize_equalises_the_singular_values
chat-mask           data.chat_turns            chat_mask_by_hand
length-batches      data.length_batches        batches_cover_everything_once
masked-loss         sft.masked_loss            masked_loss_by_hand
                    the_mean_is_over_tokens_of_the_whole_batch
freeze-words        sft.freeze_words           words_keep_their_embeddings
bradley-terry       reward.preference_loss     preference_loss_by_hand equal_scores_cost_ln_2
                    a_soft_label_is_a_mixture_of_both_choices huge_margins_stay_finite
last-token          reward.last_token_score    the_score_is_read_at_the_last_real_token
annotator           reward.annotate            the_annotator_follows_bradley_and_terry
                    votes_are_averaged
calibration         reward.evaluate            a_perfect_judge_reaches_the_ceiling
                    pairs_are_formed_within_a_question a_judge_of_length_is_found_out
log-probs           ppo.token_logprobs         token_logprobs_by_hand
kl-reward           ppo.token_rewards          the_kl_fine_has_the_right_sign
                    the_score_goes_to_the_last_real_token
gae                 ppo.advantages_and_returns advantages_by_hand
                    advantages_are_the_explicit_double_sum padding_never_reaches_the_advantages
whiten              ppo.whiten                 whitening_looks_at_the_answers_only
policy-loss         ppo.policy_loss            policy_loss_by_hand the_log_ratio_is_clamped
                    policy_loss_pushes_the_right_way policy_loss_ignores_padding
value-loss          ppo.value_loss             value_loss_by_hand
kl-estimates        ppo.kl_estimates           kl_estimators_against_the_exact_value
critique-and-revise rlaif.critique_and_revise  a_critique_is_split_from_its_revision
                    a_revision_cut_off_in_the_middle_is_not_used
reject-revision     rlaif.reject_revision      why_a_revision_is_dropped
to-learn            rlaif.to_learn             what_sl_cai_is_fine_tuned_on
both-orders         rlaif.both_orders          a_judge_that_always_says_a_teaches_nothing
                    labels_point_to_the_better_answer"""
# a line that starts with a space goes on with the tests of the one before it
ROWS = [row.split() for row in TABLE.replace("\n ", " ").split("\n")[1:]]
FILL_INS = {name: (*place.split(".", 1), tests) for name, place, *tests in ROWS}

def leave_out(source, function):
    """A file's text, and "function" or "Class.method" in it -> the text without its body; what is
    kept of it, lines; the number of the first of them."""
    node, lines = ast.parse(source), source.split("\n")
    for name in function.split("."):                       # into the class, then to its method
        node = next(child for child in node.body if getattr(child, "name", None) == name)
    start, docstring = node.lineno - 1, node.body[0]       # the tree counts lines from 1
    gap = " " * docstring.col_offset + "raise NotImplementedError"    # indented like the body
    kept = [*lines[start:docstring.end_lineno], gap]       # what stands above it is not touched
    return "\n".join([*lines[:start], *kept, *lines[node.end_lineno:]]), kept, node.lineno

def main(argv=None):
    p = argparse.ArgumentParser(description="Copy the project without one function's body.")
    p.add_argument("name", nargs="?", choices=FILL_INS, help="of a function; default: list them")
    p.add_argument("--out", metavar="FOLDER", help="a new folder; default: out/NAME")
    args = p.parse_args(argv)
    if args.name is None:                                  # nobody knows them by heart
        for name, (file, function, _) in FILL_INS.items():
            print(f"{name:21}{function} in {file}.py")
        return
    (file, function, tests), folder = FILL_INS[args.name], Path(args.out or f"out/{args.name}")
    if folder.is_dir() and any(folder.iterdir()):          # it may hold somebody's answer
        raise SystemExit(f"{folder} is not empty: name a new folder with --out")
    try:
        (folder / "tests").mkdir(parents=True, exist_ok=True)
    except OSError as error:                               # a file of that name, or no permission
        raise SystemExit(f"{folder} cannot be made ({error.strerror}): use --out") from None
    # what the judging tests need, and the stages, which run there too; no results, no other tests
    for pattern in ("*.py", "*.txt", ".pytest.ini", "tests/conftest.py", f"tests/test_{file}.py"):
        for path in ROOT.glob(pattern):
            shutil.copyfile(path, folder / path.relative_to(ROOT))
    original, place = ROOT / f"{file}.py", folder / f"{file}.py"
    text, kept, line = leave_out(original.read_text(encoding="utf-8"), function)
    place.write_text(text, encoding="utf-8")               # over the whole one, just copied
    hints = next(page for page in (ROOT / "docs").glob("*.md")
                 if f"\n### {args.name}\n" in page.read_text(encoding="utf-8"))
    command = " ".join(f"tests/test_{file}.py::test_{test}" for test in tests)     # -x: the first
    print(*kept, "", sep="\n")                             # that fails ends it, and has a reason
    print(f"Write it: {place}, line {line + len(kept) - 1}. The docstring says all that it has to "
          f"do. Then, to be judged:\n\n    cd \"{folder}\"\n    python -m pytest -x {command}\n\n"
          f"(It takes pytest.) Stuck? {hints} has two hints under {args.name}.")

if __name__ == "__main__":
    main()

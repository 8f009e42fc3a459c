"""The commands of preferences, as a user types them."""

from script_runs import run_script


def test_mistakes_are_one_sentence(tmp_path, repo_root):
    for script, words, sentence in (
        ("collect_preferences.py", ["checkpoint=nowhere"], "No checkpoint at nowhere"),
        ("label_preferences.py", ["pairs=nowhere", "port=0"], "No demonstrations at nowhere"),
        ("finetune_preferences.py", ["checkpoint=a", "pairs=b", "loss.beta=0"], "No checkpoint at a"),
    ):
        assert sentence in run_script(tmp_path, repo_root, script, *words, fails=True).stderr

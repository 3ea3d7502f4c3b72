"""One run at a time."""

import threading
import time

from unicon_pipeline.folder_lock import folder_lock


def test_a_second_run_waits_for_the_first(tmp_path, caplog):
    order = []

    def second():
        with folder_lock(tmp_path, poll_seconds=0.01):
            order.append("second")

    with folder_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "waiting" in caplog.text

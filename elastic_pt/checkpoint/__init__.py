"""Training state in memory and as files in the bucket. There are four operations:

            worker: `train.checkpoints.Checkpoints`       agent: `agent.checkpointing`
    load    read this worker's rows, from memory,         choose the newest state in memory, or the newest checkpoint
            peers or the bucket                           whose files are all there
    save    copy this worker's rows into a buffer,        upload the shard from there; commit, on the node that
            which is kept; wait for a free one            `in_flight` chooses
    wait                                                  until the last state is in memory, or committed
    close   (buffers belong to the agent)                 finish the commits that are due, within a limit

The steps of each operation, and their functions:

    save, worker    snapshot.SnapshotBuffers.write
    save, agent     upload.Uploader ─► shard_file.describe_shard ─► store.write
                    after the node's last worker: upload.publish_node (record, notice)
    save, one node  commit.Committer ─► publish.Collector ─► publish.publish_manifest ─► history ─► COMMIT
                    then, while training continues: commit.Tidier ─► sweep.Sweeper ─► retention
    load, agent     verify.quick_check
    load, worker    memory.MemoryState, or index.read_index ─► restore.load_rows
    command line    verify.verify, verify.newest_usable, index.read_manifest, digest

The contents of the files: `layout` (names, tensors, state), `nodes` (documents of the nodes and the manifest),
`record` (how a document is encoded, sealed and checked). Helpers: `footprint` (sizes, computed from the
configuration) and `job_thread` (the threads of upload, commit and deletes).
"""

//go:build !(planted_short_cooldown || planted_blind_repeat || planted_shared_device || planted_new_token || planted_no_tombstones || planted_no_records || planted_return_cooling || planted_partial_whole || planted_no_deadline || planted_keep_ignored || planted_link_ignored || planted_not_live || planted_forget_early || planted_orphan_leaked || planted_two_mutations || planted_floor_forgotten || planted_nothing_returned || planted_stale_return || planted_delete_used || planted_stale_evicts || planted_imds_believed || planted_pool_ignored || planted_linger_forgotten || planted_sets_refused || planted_drift_ignored)

package planted

// Bug is the fault that is planted.
const Bug = None

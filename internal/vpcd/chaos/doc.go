// Package chaos makes vpcd's API as slow, as forgetful and as unreliable as the
// real one may be: latency, throttling by AWS's token buckets, injected
// errors, and the lags by which different views of the truth run behind it.
//
//	Settings  what is asked for: a value, with a JSON form
//	Control   holds the Settings while vpcd runs; its Gate stands before each
//	          handler of package query. Others read the lags with Get.
//
// Settings live in memory alone: a restarted vpcd behaves well again.
//
// A Control is safe for concurrent use. Waiting happens outside its lock.
package chaos

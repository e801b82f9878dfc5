//go:build planted_new_token

package planted

// Bug is the fault that is planted.
const Bug = NewToken

//go:build planted_blind_repeat

package planted

// Bug is the fault that is planted.
const Bug = BlindRepeat

//go:build planted_short_cooldown

package planted

// Bug is the fault that is planted.
const Bug = ShortCooldown

//go:build planted_return_cooling

package planted

// Bug is the fault that is planted.
const Bug = ReturnCooling

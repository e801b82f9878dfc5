//go:build planted_floor_forgotten

package planted

// Bug is the fault that is planted.
const Bug = FloorForgotten

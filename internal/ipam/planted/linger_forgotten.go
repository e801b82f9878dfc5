//go:build planted_linger_forgotten

package planted

// Bug is the fault that is planted.
const Bug = LingerForgotten

//go:build planted_shared_device

package planted

// Bug is the fault that is planted.
const Bug = SharedDevice

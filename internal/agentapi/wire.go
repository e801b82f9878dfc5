package agentapi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

const headerLen = 4

// errTooLong is wrapped by what readBody and frame return.
var errTooLong = errors.New("message too long")

// frame puts the length in front of a message.
func frame(msg []byte) ([]byte, error) {
	if len(msg) > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errTooLong, len(msg), MaxMessage)
	}
	b := make([]byte, headerLen, headerLen+len(msg))
	binary.BigEndian.PutUint32(b, uint32(len(msg)))
	return append(b, msg...), nil
}

// readBody reads what header announces. The buffer grows with what arrives,
// so that a length alone costs no memory.
func readBody(header [headerLen]byte, r io.Reader) ([]byte, error) {
	n := binary.BigEndian.Uint32(header[:])
	if n > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes announced, at most %d", errTooLong, n, MaxMessage)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err != nil {
		return nil, err
	}
	if len(b) < int(n) {
		return nil, fmt.Errorf("%d of %d bytes: %w", len(b), n, io.ErrUnexpectedEOF)
	}
	return b, nil
}

// readMessage reads one message.
func readMessage(r io.Reader) ([]byte, error) {
	var header [headerLen]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	return readBody(header, r)
}

// readMessageFile reads one message and the file that came with its first
// byte, nil when there was none. The caller closes the file, also on error.
func readMessageFile(c *net.UnixConn) ([]byte, *os.File, error) {
	var (
		header [headerLen]byte
		file   *os.File
		oob    = make([]byte, syscall.CmsgSpace(4*maxFiles))
	)
	for got := 0; got < headerLen; {
		n, oobn, flags, _, err := c.ReadMsgUnix(header[got:], oob)
		if err != nil {
			return nil, file, err
		}
		files, err := parseFiles(oob[:oobn])
		if err != nil {
			return nil, file, err
		}
		if flags&syscall.MSG_CTRUNC != 0 || len(files) > 1 || (file != nil && len(files) > 0) {
			for _, f := range files {
				f.Close()
			}
			return nil, file, errors.New("more than one file came along")
		}
		if len(files) == 1 {
			file = files[0]
		}
		if n == 0 && len(files) == 0 {
			return nil, file, io.ErrUnexpectedEOF
		}
		got += n
	}
	b, err := readBody(header, c)
	return b, file, err
}

// maxFiles is the room for descriptors in one message: more than the one that
// is welcome, so that a second is seen and closed by us.
const maxFiles = 4

// parseFiles returns the files in a control message; on error it has closed
// those it found.
func parseFiles(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for i := range msgs {
		fds, err := syscall.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // not SCM_RIGHTS
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "netns"))
		}
	}
	return files, nil
}

// writeMessage writes one message.
func writeMessage(w io.Writer, msg []byte) error {
	b, err := frame(msg)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

package recorder

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/underlay-cni/underlay/internal/flowlog"
)

// position is the content of position.json.
type position struct {
	Boot   string // the kernel's boot_id: counters of another boot are others
	Number int
	Size   int64
	Log    flowlog.Log
	// Generation is that of the changes that go on from here.
	Generation int
}

// further is a line of the changes since the position.
type further struct {
	Number int
	Size   int64
	Change flowlog.Change
}

// files are the record files of a folder.
type files struct {
	dir   string
	limit int64 // bytes after which a new file begins
	keep  int   // how many there are at most
	now   *os.File
	at    position

	changes     *os.File // nil: the position has to be written first
	changesSize int64
	// changesLeast is the size up to which they are added up in any case, in bytes;
	// beyond it, until they are as large as the position.
	changesLeast int64
	baseSize     int64 // of position.json
}

func (f *files) name(n int) string { return filepath.Join(f.dir, fmt.Sprintf("flows-%06d.log", n)) }

// openFiles opens a folder, which it makes if it is missing, where its position
// says. What was written behind the position is cut off.
func openFiles(dir string, limit int64, keep int, boot string) (_ *files, err error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	f := &files{dir: dir, limit: limit, keep: keep, changesLeast: 1 << 20}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if err := f.readPosition(); err != nil {
		return nil, fmt.Errorf("%w; remove position.json and position-*.log in %s to begin anew, the intervals since are then skipped", err, dir)
	}
	f.sweepChanges()
	if f.at.Boot != boot {
		f.at.Log = flowlog.Log{}
		f.endChanges() // they go on from another
	}
	f.at.Boot = boot
	numbers, err := f.numbers()
	if err != nil {
		return nil, err
	}
	for _, n := range numbers {
		if n > f.at.Number {
			if err := os.Remove(f.name(n)); err != nil {
				return nil, err
			}
		}
	}
	if f.now, err = os.OpenFile(f.name(f.at.Number), os.O_CREATE|os.O_WRONLY, 0o640); err != nil {
		return nil, err
	}
	end, err := f.now.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if end < f.at.Size { // somebody took it away
		f.at.Size = end
	}
	if err := f.now.Truncate(f.at.Size); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *files) positionFile() string { return filepath.Join(f.dir, "position.json") }

func (f *files) changesFile(generation int) string {
	return filepath.Join(f.dir, fmt.Sprintf("position-%d.log", generation))
}

// readPosition reads the position and what has changed since. A line without its
// end was not written to it, and does not count.
func (f *files) readPosition() error {
	b, err := os.ReadFile(f.positionFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &f.at); err != nil {
		return fmt.Errorf("read %s: %w", f.positionFile(), err)
	}
	f.baseSize = int64(len(b))
	name := f.changesFile(f.at.Generation)
	if f.changes, err = os.OpenFile(name, os.O_RDWR, 0); errors.Is(err, fs.ErrNotExist) {
		f.changes = nil
		return nil
	} else if err != nil {
		return err
	}
	var all []flowlog.Change
	for r := bufio.NewReader(f.changes); ; {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		var next further
		if err := json.Unmarshal(line, &next); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		f.changesSize += int64(len(line))
		f.at.Number, f.at.Size = next.Number, next.Size
		all = append(all, next.Change)
	}
	f.at.Log.Apply(all...)
	return nil
}

// sweepChanges removes the changes of positions that are no more: what a process
// left that was killed after it wrote another.
func (f *files) sweepChanges() {
	names, _ := filepath.Glob(filepath.Join(f.dir, "position-*.log")) // the pattern is good
	for _, name := range names {
		if name != f.changesFile(f.at.Generation) {
			_ = os.Remove(name) // nobody reads it
		}
	}
}

// endChanges has the next position written whole.
func (f *files) endChanges() {
	if f.changes != nil {
		f.changes.Close()
		f.changes = nil
	}
}

// numbers lists the files that are there, ascending.
func (f *files) numbers() ([]int, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range entries {
		var n int
		if _, err := fmt.Sscanf(e.Name(), "flows-%06d.log", &n); err == nil && filepath.Base(f.name(n)) == e.Name() {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}

// write appends text behind the position, header first in a new file, and moves
// the position on: log is what has been recorded then, and change what is new in
// it.
func (f *files) write(header string, text []byte, log flowlog.Log, change flowlog.Change) error {
	if f.at.Size > 0 && f.at.Size+int64(len(text)) > f.limit {
		if err := f.rotate(); err != nil {
			return err
		}
	}
	if f.at.Size == 0 && header != "" {
		text = append([]byte(header+"\n"), text...)
	}
	if _, err := f.now.WriteAt(text, f.at.Size); err != nil {
		return err
	}
	next := f.at
	next.Size += int64(len(text))
	next.Log = log
	return f.save(next, change)
}

func (f *files) rotate() error {
	next, err := os.OpenFile(f.name(f.at.Number+1), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	if err := f.now.Close(); err != nil {
		return errors.Join(err, next.Close())
	}
	f.now = next
	f.at.Number++
	f.at.Size = 0
	numbers, err := f.numbers()
	if err != nil {
		return err
	}
	for len(numbers) > f.keep {
		if err := os.Remove(f.name(numbers[0])); err != nil {
			return err
		}
		numbers = numbers[1:]
	}
	return nil
}

// save makes p the position: by a line of changes, or anew if there are as many
// of these as the position is long.
func (f *files) save(p position, change flowlog.Change) error {
	if f.changes == nil || f.changesSize > max(f.baseSize, f.changesLeast) {
		return f.saveWhole(p)
	}
	b, err := json.Marshal(further{p.Number, p.Size, change})
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if _, err := f.changes.WriteAt(b, f.changesSize); err != nil {
		f.endChanges() // what is there of the line would stand before the next one's end
		return err
	}
	f.changesSize += int64(len(b))
	f.at = p
	return nil
}

// saveWhole replaces position.json, after the file for the changes from there on
// is there, and empty.
func (f *files) saveWhole(p position) error {
	p.Generation = f.at.Generation + 1
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	changes, err := os.OpenFile(f.changesFile(p.Generation), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o640)
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.positionFile()+".new", b, 0o640); err != nil {
		return errors.Join(err, changes.Close())
	}
	if err := os.Rename(f.positionFile()+".new", f.positionFile()); err != nil {
		return errors.Join(err, changes.Close())
	}
	f.endChanges()
	old := f.changesFile(f.at.Generation)
	f.at, f.changes, f.changesSize, f.baseSize = p, changes, 0, int64(len(b))
	_ = os.Remove(old) // nobody reads it any more
	return nil
}

func (f *files) close() error {
	f.endChanges()
	if f.now == nil {
		return nil
	}
	return f.now.Close()
}

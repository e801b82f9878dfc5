package recorder

import (
	"encoding/json"
	"errors"
	"fmt"
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
}

// files are the record files of a folder.
type files struct {
	dir   string
	limit int64 // bytes after which a new file begins
	keep  int   // how many there are at most
	now   *os.File
	at    position
}

func (f *files) name(n int) string { return filepath.Join(f.dir, fmt.Sprintf("flows-%06d.log", n)) }

// openFiles opens a folder, which it makes if it is missing, where its position
// says. What was written behind the position is cut off.
func openFiles(dir string, limit int64, keep int, boot string) (*files, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, err
	}
	f := &files{dir: dir, limit: limit, keep: keep}
	b, err := os.ReadFile(filepath.Join(dir, "position.json"))
	switch {
	case err == nil:
		if err := json.Unmarshal(b, &f.at); err != nil {
			return nil, fmt.Errorf("read %s: %w; remove it to begin anew, the intervals since are then skipped", filepath.Join(dir, "position.json"), err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if f.at.Boot != boot {
		f.at.Log = flowlog.Log{}
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
	end, err := f.now.Seek(0, 2)
	if err != nil {
		return nil, errors.Join(err, f.now.Close())
	}
	if end < f.at.Size { // somebody took it away
		f.at.Size = end
	}
	if err := f.now.Truncate(f.at.Size); err != nil {
		return nil, errors.Join(err, f.now.Close())
	}
	return f, nil
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
// the position on: log is what has been recorded then.
func (f *files) write(header string, text []byte, log flowlog.Log) error {
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
	if err := f.save(next); err != nil {
		return err
	}
	f.at = next
	return nil
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

func (f *files) save(p position) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	path := filepath.Join(f.dir, "position.json")
	if err := os.WriteFile(path+".new", b, 0o640); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (f *files) close() error { return f.now.Close() }

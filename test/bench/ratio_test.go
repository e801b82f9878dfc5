package bench

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

func TestMedianBound(t *testing.T) {
	// 2·P(X < k) for X of n fair coins, Dixon and Mood (1946).
	for n, want := range map[int]int{1: 0, 5: 0, 6: 0, 7: 0, 8: 0, 9: 1, 11: 1, 12: 2, 15: 3, 20: 5, 25: 7} {
		if got := medianBound(n); got != want {
			t.Errorf("of %d values the bound is the %d-th, want the %d-th", n, got, want)
		}
	}
	r := RowOf("x", "y", []float64{2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 220}, []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1})
	if r.Ratio != 12 || r.Low95 != 4 || r.High95 != 20 || r.N != 11 {
		t.Errorf("%+v", r)
	}
}

func TestMerge(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rows.json")
	for _, rows := range [][]Row{{{Name: "a", Ratio: 1}, {Name: "b", Ratio: 2}}, {{Name: "c", Ratio: 3}, {Name: "a", Ratio: 4}}} {
		if err := Merge(file, rows); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []Row
	if err := json.Unmarshal(raw, &got); err != nil || len(got) != 3 || got[0].Ratio != 4 || got[1].Name != "b" || got[2].Name != "c" {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Merge(file, nil); err == nil {
		t.Error("what is no list of rows was overwritten")
	}
}

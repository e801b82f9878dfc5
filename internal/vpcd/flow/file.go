package flow

import (
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"path"
	"reflect"
	"time"

	"github.com/parquet-go/parquet-go"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// Place says where a flow log's files are in a bucket, and of which kind.
type Place struct {
	Prefix  string // folder in the bucket, "" is its root
	Account string
	Region  string
	ID      string // fl-…
	Parquet bool
	Hive    bool // folders that say what they are: year=2026/month=…
	Hours   bool // a folder for each hour
}

// Key is the name of a file in the bucket, with the records of a stretch of time
// that has this number and ended then: the same for the same stretch, so that a
// file that is written again takes its own place.
func (p Place) Key(number uint64, end time.Time) string {
	end = end.UTC()
	folders := []string{p.Prefix, "AWSLogs"}
	if p.Hive {
		folders = append(folders, "aws-account-id="+p.Account, "aws-service=vpcflowlogs", "aws-region="+p.Region, end.Format("year=2006/month=01/day=02"))
		if p.Hours {
			folders = append(folders, end.Format("hour=15"))
		}
	} else {
		folders = append(folders, p.Account, "vpcflowlogs", p.Region, end.Format("2006/01/02"))
		if p.Hours {
			folders = append(folders, end.Format("15"))
		}
	}
	// Eight digits that tell files of one minute apart, as AWS's do: of stretches
	// that follow each other they differ for certain.
	digest := sha256.Sum256(fmt.Appendf(nil, "%s %d %d", p.ID, number, end.UnixNano()))
	kind := "log.gz"
	if p.Parquet {
		kind = "log.parquet"
	}
	file := fmt.Sprintf("%s_vpcflowlogs_%s_%s_%s_%04x%04x.%s", p.Account, p.Region, p.ID, end.Format("20060102T1504Z"), digest[:2], uint16(number), kind)
	return path.Join(append(folders, file)...)
}

// WriteText writes records as a text flow log: a header, then a line for each,
// compressed by gzip.
func WriteText(w io.Writer, f Format, records []Record) error {
	z := gzip.NewWriter(w)
	b := bufio.NewWriter(z)
	// A bufio.Writer keeps its first error for Flush.
	fmt.Fprintln(b, f.Header())
	for i := range records {
		fmt.Fprintln(b, f.Line(&records[i]))
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write flow records: %w", err)
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("write flow records: %w", err)
	}
	return nil
}

var columnTypes = map[vpc.FlowFieldType]reflect.Type{
	vpc.FlowString: reflect.TypeFor[string](),
	vpc.FlowInt32:  reflect.TypeFor[*int32](),
	vpc.FlowInt64:  reflect.TypeFor[*int64](),
}

// WriteParquet writes records as a Parquet file whose columns are the fields,
// in their order: strings, with "-" where a field does not apply, and optional
// INT_32 and INT_64, null where it does not.
func WriteParquet(w io.Writer, f Format, records []Record) error {
	fields := make([]reflect.StructField, len(f))
	for i, field := range f {
		tag := field.Column()
		if field.Type != vpc.FlowString {
			tag += ",optional"
		}
		fields[i] = reflect.StructField{Name: fmt.Sprint("F", i), Type: columnTypes[field.Type], Tag: reflect.StructTag(fmt.Sprintf(`parquet:%q`, tag))}
	}
	row := reflect.New(reflect.StructOf(fields))
	out := parquet.NewWriter(w, parquet.SchemaOf(row.Interface()), parquet.Compression(&parquet.Snappy))
	version := int32(f.Version())
	for i := range records {
		row.Elem().SetZero()
		for j, field := range f {
			v := records[i].Value(field.Name)
			if field.Name == "version" {
				v = version
			}
			to := row.Elem().Field(j)
			switch v := v.(type) {
			case string:
				to.SetString(v)
			case int32:
				to.Set(reflect.ValueOf(&v))
			case int64:
				to.Set(reflect.ValueOf(&v))
			default:
				if field.Type == vpc.FlowString {
					to.SetString(absent)
				}
			}
		}
		if err := out.Write(row.Interface()); err != nil {
			return fmt.Errorf("write flow records: %w", err)
		}
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("write flow records: %w", err)
	}
	return nil
}

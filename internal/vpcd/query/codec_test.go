package query

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// modelField is a field of model.json, read here once more so that the test
// does not lean on the generator that it checks.
type modelField struct {
	Name, Type, Item     string
	List, Required, Open bool
	Enum                 []string
	Fields               []modelField
}

type modelAction struct {
	Name              string
	NoOutput          bool
	Request, Response []modelField
}

func model(t testing.TB) []modelAction {
	b, err := os.ReadFile("model.json")
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Actions []modelAction }
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m.Actions
}

func TestModelIsWhole(t *testing.T) {
	m := model(t)
	if len(m) != 137 || len(Actions) != 137 {
		t.Fatalf("the model has %d actions, the code %d, want 137", len(m), len(Actions))
	}
}

// filler sets every field of a generated struct to a value of its own.
type filler struct{ n int }

func (f *filler) fill(v reflect.Value, tag reflect.StructTag) {
	f.n++
	switch {
	case v.Type() == reflect.TypeFor[time.Time]():
		v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, 5, f.n%1000*1e6, time.UTC)))
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		f.fill(v.Elem(), tag)
	case v.Type() == reflect.TypeFor[[]byte]():
		v.SetBytes(fmt.Appendf(nil, "\x00\xff blob %d", f.n))
	case v.Kind() == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			f.fill(v.Index(i), tag)
		}
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			f.fill(v.Field(i), v.Type().Field(i).Tag)
		}
	case v.Kind() == reflect.String:
		s := fmt.Sprintf("väl & <%d> \"+%%\n", f.n)
		if e := tag.Get("enum"); e != "" {
			s = strings.Split(e, "|")[f.n%len(strings.Split(strings.TrimSuffix(e, "|..."), "|"))]
		}
		v.SetString(s)
	case v.Kind() == reflect.Int64:
		v.SetInt(int64(f.n))
	case v.Kind() == reflect.Float64:
		v.SetFloat(float64(f.n) + 0.25)
	case v.Kind() == reflect.Bool:
		v.SetBool(f.n%2 == 0)
	}
}

// encodeForm is what a client does: it goes by the model alone.
func encodeForm(form url.Values, fields []modelField, v reflect.Value, path string) {
	for _, f := range fields {
		fv := v.FieldByName(strings.ToUpper(f.Name[:1]) + f.Name[1:])
		if f.List {
			for i := range fv.Len() {
				encodeFormValue(form, f, fv.Index(i), join(path, f.Name)+"."+strconv.Itoa(i+1))
			}
		} else if !fv.IsNil() {
			if fv.Kind() == reflect.Pointer {
				fv = fv.Elem()
			}
			encodeFormValue(form, f, fv, join(path, f.Name))
		}
	}
}

func encodeFormValue(form url.Values, f modelField, v reflect.Value, path string) {
	switch f.Type {
	case "struct":
		encodeForm(form, f.Fields, v, path)
	case "blob":
		form.Set(path, base64.StdEncoding.EncodeToString(v.Bytes()))
	case "timestamp":
		form.Set(path, v.Interface().(time.Time).Format(time.RFC3339Nano))
	default:
		form.Set(path, fmt.Sprint(v.Interface()))
	}
}

func TestEveryRequestRoundTrips(t *testing.T) {
	for _, ma := range model(t) {
		t.Run(ma.Name, func(t *testing.T) {
			a := Actions[ma.Name]
			want := a.newRequest()
			f := &filler{}
			f.fill(reflect.ValueOf(want).Elem(), "")
			if mr := reflect.ValueOf(want).Elem().FieldByName("MaxResults"); mr.IsValid() {
				mr.Elem().SetInt(max(a.MinResults, 5))
			}
			form := url.Values{"Action": {ma.Name}, "Version": {Version}}
			encodeForm(form, ma.Request, reflect.ValueOf(want).Elem(), "")
			parsed, err := url.ParseQuery(form.Encode())
			if err != nil {
				t.Fatal(err)
			}
			got, err := a.DecodeRequest(parsed)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("decoded request (-want +got):\n%s", d)
			}
		})
	}
}

// element is any XML element.
type element struct {
	XMLName  xml.Name
	Children []element `xml:",any"`
	Text     string    `xml:",chardata"`
}

// wantElements is the tree that the model says v is encoded as.
func wantElements(fields []modelField, v reflect.Value) []element {
	var out []element
	for _, f := range fields {
		fv := v.FieldByName(strings.ToUpper(f.Name[:1]) + f.Name[1:])
		e := element{XMLName: xml.Name{Local: f.Name}}
		if f.List {
			for i := range fv.Len() {
				it := wantElement(f, fv.Index(i))
				it.XMLName.Local = "item"
				if f.Item != "" {
					it.XMLName.Local = f.Item
				}
				e.Children = append(e.Children, it)
			}
		} else {
			e = wantElement(f, fv.Elem())
		}
		out = append(out, e)
	}
	return out
}

func wantElement(f modelField, v reflect.Value) element {
	e := element{XMLName: xml.Name{Local: f.Name}}
	switch f.Type {
	case "struct":
		e.Children = wantElements(f.Fields, v)
	case "timestamp":
		e.Text = v.Interface().(time.Time).Format("2006-01-02T15:04:05.000Z")
	default:
		e.Text = fmt.Sprint(v.Interface())
	}
	return e
}

func parseXML(t testing.TB, b []byte) element {
	t.Helper()
	var e element
	dec := xml.NewDecoder(strings.NewReader(string(b)))
	if err := dec.Decode(&e); err != nil {
		t.Fatalf("parse %s: %v", b, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		t.Fatalf("after the root element: %v", err)
	}
	strip(&e)
	return e
}

func strip(e *element) {
	e.XMLName.Space = ""
	for i := range e.Children {
		strip(&e.Children[i])
	}
}

func TestEveryResponseIsAsTheModelSays(t *testing.T) {
	for _, ma := range model(t) {
		t.Run(ma.Name, func(t *testing.T) {
			a := Actions[ma.Name]
			resp := a.newResponse()
			f := &filler{}
			f.fill(reflect.ValueOf(resp).Elem(), "")
			want := element{XMLName: xml.Name{Local: ma.Name + "Response"},
				Children: []element{{XMLName: xml.Name{Local: "requestId"}, Text: "req-1"}}}
			if ma.NoOutput {
				want.Children = append(want.Children, element{XMLName: xml.Name{Local: "return"}, Text: "true"})
			}
			want.Children = append(want.Children, wantElements(ma.Response, reflect.ValueOf(resp).Elem())...)
			b := a.EncodeResponse(resp, "req-1")
			// Some answers are large, and cmp is slow: only to show a difference.
			if got := parseXML(t, b); !reflect.DeepEqual(want, got) {
				t.Errorf("encoded response (-want +got):\n%s", cmp.Diff(want, got))
			}
			if !strings.Contains(string(b), `xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"`) {
				t.Errorf("no namespace in %s", b)
			}
		})
	}
}

func TestEmptyResponses(t *testing.T) {
	tests := []struct {
		action string
		resp   any
		want   string
	}{
		{"DescribeVpcs", &DescribeVpcsResponse{}, `<requestId>r</requestId><vpcSet/></DescribeVpcsResponse>`},
		{"DescribeVpcs", &DescribeVpcsResponse{VpcSet: []Vpc{{VpcId: new("vpc-1"), TagSet: []Tag{}}}},
			`<vpcSet><item><tagSet/><vpcId>vpc-1</vpcId></item></vpcSet></DescribeVpcsResponse>`},
		{"DescribeNetworkInterfaceAttribute", &DescribeNetworkInterfaceAttributeResponse{NetworkInterfaceId: new("eni-1")},
			`<requestId>r</requestId><networkInterfaceId>eni-1</networkInterfaceId></DescribeNetworkInterfaceAttributeResponse>`},
		{"DeleteVpc", &DeleteVpcResponse{}, `<requestId>r</requestId><return>true</return></DeleteVpcResponse>`},
	}
	for _, tt := range tests {
		got := string(Actions[tt.action].EncodeResponse(tt.resp, "r"))
		if !strings.HasSuffix(got, tt.want) {
			t.Errorf("%s: %s\nwant …%s", tt.action, got, tt.want)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	tests := []struct{ action, form, code, message string }{
		{"DeleteVpc", "", "MissingParameter", "VpcId"},
		{"DeleteVpc", "VpcId=", "MissingParameter", "VpcId"},
		{"DeleteVpc", "VpcId=vpc-1&Nonsense=1", "UnknownParameter", "Nonsense"},
		{"DeleteVpc", "VpcId=vpc-1&vpcId=1", "UnknownParameter", "vpcId"},
		{"DeleteVpc", "VpcId.1=vpc-1", "UnknownParameter", "VpcId.1"},
		{"DeleteVpc", "VpcId=vpc-1&VpcId=vpc-2", "InvalidParameterValue", "VpcId"},
		{"DeleteVpc", "VpcId=%00", "InvalidParameterValue", "VpcId"},
		{"DeleteVpc", "VpcId=%ff", "InvalidParameterValue", "VpcId"},
		{"DeleteVpc", "VpcId=vpc-1&DryRun=yes", "InvalidParameterValue", "DryRun"},
		{"DescribeVpcs", "Filter.1.Name=x&Filter.1.Value=y", "UnknownParameter", "Filter.1.Value"},
		{"DescribeVpcs", "Filter.0.Name=x", "UnknownParameter", "Filter.0.Name"},
		{"DescribeVpcs", "Filter.01.Name=x", "UnknownParameter", "Filter.01.Name"},
		{"DescribeVpcs", "Filter.-1.Name=x", "UnknownParameter", "Filter.-1.Name"},
		{"DescribeVpcs", "Filter.99999999999999999999.Name=x", "UnknownParameter", "Filter.9"},
		{"DescribeVpcs", "Filter.Name=x", "UnknownParameter", "Filter.Name"},
		{"DescribeVpcs", "Filter.1.Nam.e=x", "UnknownParameter", "Filter.1.Nam.e"},
		{"DescribeVpcs", "Filter.1=x", "UnknownParameter", "Filter.1"},
		{"DescribeVpcs", "MaxResults=4", "InvalidParameterValue", "greater than or equal to 5"},
		{"DescribeVpcs", "MaxResults=1001", "InvalidParameterValue", "less than or equal to 1000"},
		{"DescribeVpcs", "MaxResults=x", "InvalidParameterValue", "MaxResults"},
		{"DescribeInstances", "MaxResults=0", "InvalidParameterValue", "maxResults"},
		{"CreateVpc", "InstanceTenancy=shared", "InvalidParameterValue", "default, dedicated, host"},
		{"CreateVpc", "Ipv4NetmaskLength=99999999999", "InvalidParameterValue", "Ipv4NetmaskLength"},
		{"CreateVpc", "VpcEncryptionControl.LambdaExclusion=enable", "MissingParameter", "VpcEncryptionControl.Mode"},
		{"TerminateInstances", "Force=true", "MissingParameter", "InstanceId"},
		{"CreateTags", "ResourceId.1=vpc-1", "MissingParameter", "Tag"},
		{"ModifyInstanceAttribute", "InstanceId=i-1&UserData.Value=%21", "InvalidParameterValue", "base64"},
	}
	for _, tt := range tests {
		t.Run(tt.action+" "+tt.form, func(t *testing.T) {
			form, err := url.ParseQuery(tt.form)
			if err != nil {
				t.Fatal(err)
			}
			req, err := Actions[tt.action].DecodeRequest(form)
			var e *Error
			if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(e.Message, tt.message) {
				t.Fatalf("decoded %+v, error %v; want %s with %q", req, err, tt.code, tt.message)
			}
		})
	}
}

func TestDecodeAccepts(t *testing.T) {
	form, err := url.ParseQuery("Filter.999999999.Name=b&Filter.7.Name=a&Filter.7.Value.3=y&Filter.7.Value.2=x&VpcId=&X-Amz-Date=1&Action=DescribeVpcs")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Actions["DescribeVpcs"].DecodeRequest(form)
	if err != nil {
		t.Fatal(err)
	}
	want := &DescribeVpcsRequest{Filter: []Filter{{Name: new("a"), Value: []string{"x", "y"}}, {Name: new("b")}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// An open enumeration takes values that the model does not list.
	form = url.Values{"ImageId": {"ami-1"}, "InstanceType": {"m9z.mega"}, "MinCount": {"1"}, "MaxCount": {strconv.Itoa(math.MaxInt32)}}
	if _, err := Actions["RunInstances"].DecodeRequest(form); err != nil {
		t.Error(err)
	}
}

func FuzzDecodeRequest(f *testing.F) {
	for _, s := range []string{
		"Action=RunInstances&MinCount=1&MaxCount=1&NetworkInterface.1.SecurityGroupId.1=sg-1&NetworkInterface.1.PrivateIpAddresses.2.Primary=true",
		"Action=DescribeVpcs&Filter.999999999.Name=b&Filter.1.Value.1=x",
		"Action=ModifyInstanceAttribute&InstanceId=i&UserData.Value=AAE=",
		"Action=CreateTags&ResourceId.1=a&Tag.1.Key=%ff", "Action=DeleteVpc&VpcId..=1&.=2&=3",
	} {
		f.Add(s)
	}
	actions := model(f)
	f.Fuzz(func(t *testing.T, query string) {
		form, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		a := Actions[form.Get("Action")]
		if a == nil {
			return
		}
		req, err := a.DecodeRequest(form)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Code == "" || !isText(e.Message) {
				t.Fatalf("error %#v", err)
			}
			parseXML(t, e.body("r"))
			return
		}
		// What decodes, encodes to a request that decodes to the same, but
		// for empty lists, which leave no trace in a form.
		for _, vs := range form {
			if slices.Contains(vs, "") {
				return
			}
		}
		i := slices.IndexFunc(actions, func(m modelAction) bool { return m.Name == a.Name })
		again := url.Values{}
		encodeForm(again, actions[i].Request, reflect.ValueOf(req).Elem(), "")
		got, err := a.DecodeRequest(again)
		if err != nil {
			t.Fatalf("decode %v again: %v", again, err)
		}
		if d := cmp.Diff(req, got, cmpopts.EquateNaNs()); d != "" {
			t.Fatalf("decoded again (-first +again):\n%s", d)
		}
	})
}

package kubebuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Options say what to make, out of what, and where to keep it.
type Options struct {
	// Source is Underlay's repository: it holds hack/kubernetes, hack/coredns
	// and hack/helm. "" looks above the running program, then above the working
	// directory.
	Source string

	// Cache is the folder above "kubernetes"; "" is $UNDERLAY_CACHE, else
	// "underlay" in the user's cache folder.
	Cache string

	// Programs is the folder with underlay-agent and underlay-cni, of which
	// Underlay's image is made; "" is that of the running program.
	Programs string

	// Want names programs, and "underlay" for Underlay's image. An image is made
	// with the program in it. nil is what a cluster needs: all but e2e.test and
	// ginkgo.
	Want []string

	// Progress is told what is being made, how many things are finished and how
	// many there are to make; often, from one goroutine at a time. What has the
	// form "kubelet" or "kubelet: detail". It is not called when there is
	// nothing to do. May be nil; Reporter makes one for people.
	Progress func(what string, done, of int)

	// Log gets the compiler's output, which also stands in build.log. May be nil.
	Log io.Writer
}

// Artifacts is what Ensure made or found.
type Artifacts struct {
	Version string // of Kubernetes: "v1.37.2"
	Bin     string // folder of the programs
	Images  []Image
}

// Image is an image in the cache.
type Image struct {
	Name    string   // "pause", "coredns", "agnhost", "busybox" or "underlay"
	Ref     string   // "registry.k8s.io/pause:3.10.2"
	Aliases []string // further names that the archive gives it
	Tar     string   // an OCI image layout that "ctr -n k8s.io images import" takes
}

// Image returns the image with that Name.
func (a *Artifacts) Image(name string) (Image, bool) {
	for _, image := range a.Images {
		if image.Name == name {
			return image, true
		}
	}
	return Image{}, false
}

// Underlay is the name in Want of Underlay's own image.
const Underlay = "underlay"

// Names returns all that may stand in Want.
func Names() []string {
	var names []string
	for _, p := range programs {
		names = append(names, p.name)
	}
	return append(names, Underlay)
}

// Default returns what a nil Want stands for.
func Default() []string {
	var names []string
	for _, p := range programs {
		if !p.optional {
			names = append(names, p.name)
		}
	}
	return append(names, Underlay)
}

// Ensure makes what is wanted and not there yet, and returns where it is. It may
// take half an hour the first time, and milliseconds once all is there. One
// process builds at a time; others wait for it, and say so. It ends with ctx, and
// what was finished by then is kept.
func Ensure(ctx context.Context, o Options) (*Artifacts, error) {
	b, err := prepare(ctx, o)
	if err != nil {
		return nil, err
	}
	todo, err := b.missing()
	if err != nil {
		return nil, err
	}
	if len(todo) > 0 {
		if err := b.make(ctx); err != nil {
			return nil, err
		}
	}
	return b.artifacts()
}

// builder is one call of Ensure.
type builder struct {
	source   string
	root     string // CACHE/kubernetes
	folder   folder
	versions versions
	goTool   string
	compiler string // what go env GOVERSION says: "go1.26.8"
	items    []item // what is wanted, programs first
	progress func(what string, done, of int)
	log      io.Writer

	done, of int // of the items that are being made
}

// item is something to make: a program or an image.
type item struct {
	name  string
	image bool
	path  string // in the folder: "bin/kubelet"
	key   string // of all inputs; equal keys, equal content
	make  func(ctx context.Context, b *builder, to string) (refs []string, err error)
}

// label is how people are told of it: an image often has a program's name.
func (it item) label() string {
	if it.image {
		return "image " + it.name
	}
	return it.name
}

// prepare finds source, cache and tools, and says what is wanted, with keys.
func prepare(ctx context.Context, o Options) (*builder, error) {
	want := o.Want
	if want == nil {
		want = Default()
	}
	for _, i := range images {
		if i.also != "" && slices.Contains(want, i.program) && !slices.Contains(want, i.also) {
			want = append(slices.Clone(want), i.also)
		}
	}
	for _, name := range want {
		if !slices.Contains(Names(), name) {
			return nil, fmt.Errorf("build %q: it is not known; known are %s", name, strings.Join(Names(), ", "))
		}
	}
	b := &builder{progress: o.Progress, log: o.Log}
	if b.progress == nil {
		b.progress = func(string, int, int) {}
	}
	var err error
	if b.source, err = findSource(o.Source); err != nil {
		return nil, err
	}
	if b.root, err = cacheRoot(o.Cache); err != nil {
		return nil, err
	}
	if b.goTool, err = findGo(); err != nil {
		return nil, err
	}
	if b.compiler, err = b.goVersion(ctx); err != nil {
		return nil, err
	}
	if b.versions, err = readVersions(b.source); err != nil {
		return nil, err
	}
	keys, hash, err := b.keys(want)
	if err != nil {
		return nil, err
	}
	b.folder = folder{filepath.Join(b.root, b.versions.kubernetes+"-"+hash)}
	for _, p := range programs {
		if slices.Contains(want, p.name) {
			b.items = append(b.items, item{name: p.name, path: "bin/" + p.name, key: keys[p.name], make: p.build})
		}
	}
	images, err := b.imageItems(want, keys, o.Programs)
	if err != nil {
		return nil, err
	}
	b.items = append(b.items, images...)
	return b, nil
}

// missing returns the items that the folder does not have.
func (b *builder) missing() ([]item, error) {
	m, err := b.folder.manifest()
	if err != nil {
		return nil, err
	}
	var todo []item
	for _, it := range b.items {
		if !b.folder.has(m, it) {
			todo = append(todo, it)
		}
	}
	return todo, nil
}

// make makes what is missing, as the only builder.
func (b *builder) make(ctx context.Context) error {
	todo, err := b.missing()
	if err != nil {
		return err
	}
	if err := b.checkTools(todo); err != nil { // before a build of half an hour
		return err
	}
	l, err := lockBuild(ctx, b.root, func(holder string) {
		b.progress("waiting: for "+holder, 0, len(todo))
	})
	if err != nil {
		return err
	}
	defer l.release()
	if todo, err = b.missing(); err != nil { // the other builder may have made it
		return err
	}
	scratch, err := b.folder.scratch()
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	b.of = len(todo)
	told := false
	for i, it := range todo {
		b.done = i
		if !told && !it.image && it.name != "pause" {
			told = true
			b.progress(it.label()+": "+firstBuild, b.done, b.of)
		}
		l.tell(fmt.Sprintf("%s, %d of %d", it.label(), i+1, b.of))
		if err := b.one(ctx, it, filepath.Join(scratch, filepath.Base(it.path))); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("make %s: interrupted (%w); what was finished is kept, the next build goes on from there", it.label(), context.Cause(ctx))
			}
			return err
		}
	}
	b.folder.prune(time.Now(), keptImages, keptAge)
	if b.of > 0 {
		b.progress("finished", b.of, b.of)
	}
	return nil
}

// firstBuild is said before the first large program.
const firstBuild = "the first build of Kubernetes takes 5 to 30 minutes on two cores, later ones what has changed"

// one makes one item at the path to and moves it into the folder.
func (b *builder) one(ctx context.Context, it item, to string) error {
	b.progress(it.label(), b.done, b.of)
	e, found := linkFrom(b.root, it, to)
	if !found {
		refs, err := it.make(ctx, b, to)
		if err != nil {
			return err
		}
		e = entry{Key: it.key, Refs: refs}
	}
	return b.folder.put(it, to, e)
}

// artifacts says where things are.
func (b *builder) artifacts() (*Artifacts, error) {
	m, err := b.folder.manifest()
	if err != nil {
		return nil, err
	}
	a := &Artifacts{Version: b.versions.kubernetes, Bin: filepath.Join(b.folder.dir, "bin")}
	for _, it := range b.items {
		if !b.folder.has(m, it) {
			return nil, fmt.Errorf("%s was made and is gone from %s: something else removes files there; try again", it.name, b.folder.dir)
		}
		if refs := m.Entries[it.path].Refs; len(refs) > 0 {
			a.Images = append(a.Images, Image{Name: it.name, Ref: refs[0], Aliases: refs[1:], Tar: filepath.Join(b.folder.dir, it.path)})
		}
	}
	return a, nil
}

// findSource returns the repository: given, or above the running program, or
// above the working directory.
func findSource(given string) (string, error) {
	holds := func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "hack", "kubernetes", "go.mod"))
		return err == nil
	}
	if given != "" {
		abs, err := filepath.Abs(given)
		if err != nil {
			return "", fmt.Errorf("find Underlay's source: %w", err)
		}
		if !holds(abs) {
			return "", fmt.Errorf("find Underlay's source: %s has no hack/kubernetes/go.mod; name a checkout of the repository", abs)
		}
		return abs, nil
	}
	var starts []string
	if self, err := os.Executable(); err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			starts = append(starts, filepath.Dir(self))
		}
	}
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	for _, dir := range starts {
		for ; ; dir = filepath.Dir(dir) {
			if holds(dir) {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", errors.New("find Underlay's source: neither the folder of this program nor the working directory is in a checkout of the repository, and Kubernetes is built from hack/kubernetes there; change into one")
}

// cacheRoot returns CACHE/kubernetes.
func cacheRoot(given string) (string, error) {
	if given == "" {
		given = os.Getenv("UNDERLAY_CACHE")
	}
	if given == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("find a folder for Kubernetes' programs: %w; name one in UNDERLAY_CACHE", err)
		}
		given = filepath.Join(dir, "underlay")
	}
	abs, err := filepath.Abs(given)
	if err != nil {
		return "", fmt.Errorf("find a folder for Kubernetes' programs: %w", err)
	}
	return filepath.Join(abs, "kubernetes"), nil
}

// arch is what programs and images are made for.
const arch = runtime.GOARCH

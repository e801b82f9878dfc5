package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
)

const kubernetesHelp = `Kubernetes for labs is compiled on this machine from its Go modules, in the
versions that hack/kubernetes, hack/coredns and hack/helm of the source fix, and
kept in a cache: $UNDERLAY_CACHE, else "underlay" in the user's cache folder. The
first build takes 5 to 30 minutes on two cores and needs Go and the internet;
later ones take what has changed, and with nothing changed milliseconds, offline.

"underlay up --kubernetes" does it by itself when something is missing.`

func (a *App) kubernetesCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "kubernetes",
		Short: "Build Kubernetes for labs, and remove builds that are not needed",
		Long:  kubernetesHelp,
		Example: `  underlay kubernetes build
  underlay kubernetes build --with e2e       # upstream's network tests, too
  underlay kubernetes image underlay.tar     # Underlay's image, for amd64 and arm64
  underlay kubernetes clean`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.kubernetesBuildCommand(), a.kubernetesImageCommand(), a.kubernetesCleanCommand())
	return c
}

// ensureKubernetes makes what is wanted and tells on stderr how that goes.
func (a *App) ensureKubernetes(ctx context.Context, o kubebuild.Options) (*kubebuild.Artifacts, error) {
	r := kubebuild.NewReporter(a.Err, isTerminal(a.Err))
	defer r.End()
	o.Progress = r.Progress
	return kubebuild.Ensure(ctx, o)
}

func (a *App) kubernetesBuildCommand() *cobra.Command {
	var o kubebuild.Options
	var with []string
	c := &cobra.Command{
		Use:   "build [PROGRAM…]",
		Short: "Build Kubernetes' programs and the images of a lab into the cache",
		Long: `Builds what a lab with Kubernetes needs, or the named programs with the images
made of them. What is in the cache already is not built again. Several may run
it at once: one builds, the others wait and say for whom.

Known are ` + strings.Join(kubebuild.Names(), ", ") + `.`,
		Example: `  underlay kubernetes build
  underlay kubernetes build --with e2e
  underlay kubernetes build kubectl helm -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Want = args
			if len(args) == 0 {
				o.Want = kubebuild.Default()
			}
			for _, w := range with {
				if w != "e2e" {
					return fmt.Errorf("--with %s is not known; use --with e2e", w)
				}
				o.Want = append(o.Want, "ginkgo", "e2e.test")
			}
			artifacts, err := a.ensureKubernetes(cmd.Context(), o)
			if err != nil {
				return err
			}
			return a.print(artifacts, func(w io.Writer) { printArtifacts(w, artifacts) })
		},
		ValidArgs: kubebuild.Names(),
	}
	sourceFlag(c, &o)
	c.Flags().StringSliceVar(&with, "with", nil, "more than a lab needs: e2e (upstream's network tests and Ginkgo)")
	_ = c.RegisterFlagCompletionFunc("with", cobra.FixedCompletions([]string{"e2e"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func sourceFlag(c *cobra.Command, o *kubebuild.Options) {
	c.Flags().StringVar(&o.Source, "source", "", "Underlay's repository (default: the one that this program or the working directory is in)")
}

func printArtifacts(w io.Writer, a *kubebuild.Artifacts) {
	fmt.Fprintf(w, "Kubernetes %s: programs in %s\n", a.Version, a.Bin)
	for _, i := range a.Images {
		fmt.Fprintf(w, "  image %s\n", i.Ref)
	}
}

func (a *App) kubernetesImageCommand() *cobra.Command {
	var o kubebuild.Options
	var tag string
	var archs []string
	c := &cobra.Command{
		Use:   "image FILE",
		Short: "Write Underlay's own image, for several architectures, to a file",
		Long: `Compiles the agent and the plugin for each architecture and writes one image of
them as an OCI archive, which ctr, podman, skopeo and crane take. Equal sources
and an equal Go give an equal digest. (A lab makes its own image, for this
machine, of the programs beside this one.)`,
		Example: `  underlay kubernetes image underlay.tar --tag v0.1.0
  ctr -n k8s.io images import underlay.tar
  skopeo copy --all oci-archive:underlay.tar docker://registry.example.com/underlay:v0.1.0`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("give the file to write, such as underlay.tar")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			r := kubebuild.NewReporter(a.Err, isTerminal(a.Err))
			defer r.End()
			o.Progress = r.Progress
			ref := kubebuild.UnderlayRef + ":" + tag
			digest, err := kubebuild.WriteUnderlay(cmd.Context(), o, args[0], archs, ref)
			if err != nil {
				return err
			}
			r.End()
			return a.print(map[string]string{"ref": ref, "digest": digest, "file": args[0]}, func(w io.Writer) {
				fmt.Fprintf(w, "%s@%s in %s\n", ref, digest, args[0])
			})
		},
	}
	sourceFlag(c, &o)
	c.Flags().StringVar(&tag, "tag", "dev", "the image's tag")
	c.Flags().StringSliceVar(&archs, "arch", kubebuild.Platforms, "architectures")
	return c
}

func (a *App) kubernetesCleanCommand() *cobra.Command {
	var o kubebuild.Options
	var all bool
	c := &cobra.Command{
		Use:   "clean",
		Short: "Remove builds that the source does not ask for any more",
		Long: `Removes builds of other versions, and of earlier states of the module files, from
the cache. What a lab uses stays. Go's own caches are not touched; "go clean
-cache -modcache" empties them, and the next build takes as long as the first.`,
		Example: `  underlay kubernetes clean
  underlay kubernetes clean --all            # the current build, too`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			waiting := func(holder string) { fmt.Fprintf(a.Err, "  waiting for %s …\n", holder) }
			cached, err := kubebuild.Clean(cmd.Context(), o, all, a.kubernetesUsers(), waiting)
			if err != nil {
				return err
			}
			if cached == nil {
				cached = []kubebuild.Cached{}
			}
			return a.print(cached, func(w io.Writer) { printCleaned(w, cached) })
		},
	}
	sourceFlag(c, &o)
	c.Flags().BoolVar(&all, "all", false, "the current build, too")
	return c
}

func printCleaned(w io.Writer, cached []kubebuild.Cached) {
	t := table{head: []string{"BUILD", "SIZE", ""}}
	var freed int64
	for _, c := range cached {
		what := "removed"
		switch {
		case c.Used:
			what = "kept: a lab uses it"
		case c.Current:
			what = "kept: the current one"
		}
		freed += c.Freed
		t.row(text(c.Name), cell{text: mebibytes(c.Bytes), right: true}, text(what))
	}
	if len(cached) == 0 {
		fmt.Fprintln(w, "the cache is empty")
		return
	}
	t.write(w, "", false)
	fmt.Fprintf(w, "freed %s\n", mebibytes(freed))
}

func mebibytes(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }

// kubernetesUsers returns a function that reports whether some lab uses a
// folder. A lab.json that cannot be read is taken for a user of everything.
func (a *App) kubernetesUsers() func(dir string) bool {
	names, err := labs(a.run)
	unknown := err != nil
	var bins []string
	for _, name := range names {
		var f struct {
			Lab struct {
				Kubernetes *struct {
					Bin string `json:"bin"`
				} `json:"kubernetes"`
			} `json:"lab"`
		}
		b, err := os.ReadFile(home{run: a.run, name: name}.file())
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		if err != nil {
			unknown = unknown || !os.IsNotExist(err)
			continue
		}
		if f.Lab.Kubernetes != nil {
			bins = append(bins, f.Lab.Kubernetes.Bin)
		}
	}
	return func(dir string) bool {
		if unknown {
			return true
		}
		for _, bin := range bins {
			if rel, err := filepath.Rel(dir, bin); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
				return true
			}
		}
		return false
	}
}

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"syscall"

	"accel"
	"accel/node"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
)

// labelOwner is on what a process of this program makes in containerd: the name that the process holds while it lives.
const labelOwner = "accel/owner"

// owner is a name that this process holds until it ends, however it ends: that of an abstract socket, which the kernel gives back.
// Such names are a network namespace's; whoever starts containers on the machine's network and asks them for an answer is in
// that one.
type owner struct {
	name string
	l    net.Listener // nobody connects
}

func newOwner(ctx context.Context) (*owner, error) { return hold(ctx, "@accel-owner-"+rand.Text()) }

// hold takes a name; syscall.EADDRINUSE where somebody has it.
func hold(ctx context.Context, name string) (*owner, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "unix", name)
	if err != nil {
		return nil, fmt.Errorf("hold the name %s: %w", name, err)
	}
	return &owner{name, l}, nil
}

func (o *owner) close() error { return o.l.Close() }

// gone does something in the place of an owner that has ended, and nothing where it lives, or something has no owner.
func gone(ctx context.Context, labels map[string]string, do func() error) (bool, error) {
	name := labels[labelOwner]
	if len(name) < 2 || name[0] != '@' { // else it would be a file
		return false, nil
	}
	o, err := hold(ctx, name)
	if errors.Is(err, syscall.EADDRINUSE) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, errors.Join(do(), o.close())
}

// broken has the node give up the recording of a start that nobody waits for any more, if there is one.
func broken(ctx context.Context, live *node.Client, container string) error {
	err := live.Answered(ctx, node.Answered{Container: container, Failed: true})
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	if err == nil {
		if _, lost := awaitStart(ctx, live, container); lost != nil { // which it says of one that failed
			err = ctx.Err()
		}
	}
	return err
}

// clear removes the containers and images that earlier commands left when they were killed, and says so. The node records no
// more of their starts.
func (c *containers) clear(ctx context.Context, namespace string, live *node.Client, say func(string)) error {
	left, err := c.client.Containers(ctx)
	if err != nil {
		return err
	}
	var errs []error
	told := func(what string, was bool, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s, which a command that was killed left in containerd's namespace %s: %w", what, namespace, err))
		} else if was {
			say(fmt.Sprintf("removed %s, which a command that was killed left in containerd's namespace %s", what, namespace))
		}
	}
	for _, one := range left {
		labels, err := one.Labels(ctx)
		if errdefs.IsNotFound(err) {
			continue // its own command has just removed it
		}
		if err != nil {
			return err
		}
		was, err := gone(ctx, labels, func() error {
			task, err := one.Task(ctx, nil)
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			return errors.Join((&started{container: one, task: task}).end(ctx), broken(ctx, live, one.ID()))
		})
		told("container "+one.ID(), was, err)
	}
	pulled, err := c.client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	for _, img := range pulled {
		was, err := gone(ctx, img.Labels, func() error {
			err := c.client.ImageService().Delete(ctx, img.Name, images.SynchronousDelete())
			if errdefs.IsNotFound(err) {
				return nil
			}
			return err
		})
		told("image "+img.Name, was, err)
	}
	return errors.Join(errs...)
}

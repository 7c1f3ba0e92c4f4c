//! `Deployment`: a `ReplicaSet` for each version, the newest one up before the old ones go down.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::super::object::{
    Key, annotation, condition, is_dying, name, namespace, next_condition, number, owned_by,
    resource, share, short_hash, text,
};
use super::super::view::View;
use super::sets::counts;
use super::{Clock, Outcome, Write};

/// Annotation with the number of a version.
const REVISION: &str = "deployment.kubernetes.io/revision";
/// Label that keeps the pods of versions apart.
const HASH_LABEL: &str = "pod-template-hash";

struct Rollout<'a> {
    deployment: &'a Value,
    wanted: i64,
    surge: i64,
    unavailable: i64,
    /// The set of the newest version.
    new: Option<&'a Arc<Value>>,
    /// Those of older ones, the oldest first.
    old: Vec<&'a Arc<Value>>,
}

fn replicas(set: &Value) -> i64 {
    number(set, "/spec/replicas").unwrap_or(0)
}

fn status_count(set: &Value, field: &str) -> i64 {
    number(set, &format!("/status/{field}")).unwrap_or(0)
}

fn revision(object: &Value) -> i64 {
    annotation(object, REVISION)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

fn same_template(set: &Value, deployment: &Value) -> bool {
    let mut template = set.pointer("/spec/template").cloned().unwrap_or_default();
    if let Some(labels) = template
        .pointer_mut("/metadata/labels")
        .and_then(Value::as_object_mut)
    {
        labels.remove(HASH_LABEL);
    }
    deployment.pointer("/spec/template") == Some(&template)
}

impl<'a> Rollout<'a> {
    fn read(view: &'a View, deployment: &'a Value) -> Self {
        let wanted = number(deployment, "/spec/replicas").unwrap_or(1).max(0);
        let limit =
            |field: &str| deployment.pointer(&format!("/spec/strategy/rollingUpdate/{field}"));
        let surge = share(limit("maxSurge"), wanted, "25%", true);
        let mut unavailable = share(limit("maxUnavailable"), wanted, "25%", false);
        if surge == 0 && unavailable == 0 {
            unavailable = 1;
        }
        let mut sets = view.controlled(deployment, "replicasets");
        sets.retain(|set| !is_dying(set));
        sets.sort_by_key(|set| revision(set));
        let new = sets
            .iter()
            .rev()
            .find(|set| same_template(set, deployment))
            .copied();
        let old = sets
            .into_iter()
            .filter(|set| new.is_none_or(|new| name(new) != name(set)))
            .collect();
        Self {
            deployment,
            wanted,
            surge,
            unavailable,
            new,
            old,
        }
    }

    fn sets(&self) -> impl Iterator<Item = &'a Arc<Value>> {
        self.old.iter().copied().chain(self.new)
    }

    fn newest_revision(&self) -> i64 {
        let highest = self.old.iter().map(|set| revision(set)).max().unwrap_or(0);
        self.new
            .map_or(highest + 1, |new| revision(new).max(highest + 1))
    }

    /// How many replicas the newest set may have now.
    fn room(&self) -> i64 {
        let others: i64 = self.old.iter().map(|set| replicas(set)).sum();
        let own = self.new.map_or(0, |new| replicas(new));
        let room = self.wanted + self.surge - others;
        self.wanted.min(own.max(room))
    }

    fn new_set(&self, count: i64) -> Write {
        let deployment = self.deployment;
        let template = deployment.pointer("/spec/template").cloned();
        let mut template = template.unwrap_or_default();
        let hash = short_hash(&template);
        template["metadata"]["labels"][HASH_LABEL] = hash.clone().into();
        let mut selector = deployment
            .pointer("/spec/selector")
            .cloned()
            .unwrap_or_default();
        selector["matchLabels"][HASH_LABEL] = hash.clone().into();
        let mut labels = template["metadata"]["labels"].clone();
        labels[HASH_LABEL] = hash.clone().into();
        let mut spec = json!({"replicas": count, "selector": selector, "template": template});
        if let Some(wait) = deployment.pointer("/spec/minReadySeconds") {
            spec["minReadySeconds"] = wait.clone();
        }
        Write::Create {
            resource: resource("apps", "replicasets"),
            object: json!({
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": format!("{}-{hash}", name(deployment)),
                    "namespace": namespace(deployment),
                    "labels": labels,
                    "annotations": {REVISION: self.newest_revision().to_string()},
                    "ownerReferences": owned_by(deployment),
                },
                "spec": spec,
                "status": {"replicas": 0},
            }),
        }
    }

    fn scale(set: &Arc<Value>, count: i64) -> Write {
        let mut object = (**set).clone();
        object["spec"]["replicas"] = count.into();
        let key = super::super::object::key(&resource("apps", "replicasets"), set);
        Write::update(&key, object)
    }

    /// The pods of old versions that may go without falling below what must be available.
    fn shrink_old(&self) -> Vec<Write> {
        let all: i64 = self.sets().map(|set| replicas(set)).sum();
        let least = self.wanted - self.unavailable;
        let new_missing = self.new.map_or(0, |new| {
            (replicas(new) - status_count(new, "availableReplicas")).max(0)
        });
        let mut may_go = all - least - new_missing;
        let available: i64 = self
            .sets()
            .map(|set| status_count(set, "availableReplicas"))
            .sum();
        let mut healthy_may_go = available - least;
        let mut writes = Vec::new();
        for set in &self.old {
            let count = replicas(set);
            let healthy = status_count(set, "availableReplicas").min(count);
            // What is not available is no loss; it goes first.
            let broken = (count - healthy).min(may_go).max(0);
            may_go -= broken;
            let good = healthy.min(may_go).min(healthy_may_go).max(0);
            may_go -= good;
            healthy_may_go -= good;
            if broken + good > 0 {
                writes.push(Self::scale(set, count - broken - good));
            }
        }
        writes
    }

    fn roll(&self) -> Vec<Write> {
        let Some(new) = self.new else {
            return vec![self.new_set(self.room())];
        };
        let target = self.room();
        if replicas(new) != target {
            return vec![Self::scale(new, target)];
        }
        self.shrink_old()
    }

    /// Old ones end before the new one starts.
    fn recreate(&self, view: &View) -> Vec<Write> {
        let running: Vec<Write> = self
            .old
            .iter()
            .filter(|set| replicas(set) > 0)
            .map(|set| Self::scale(set, 0))
            .collect();
        let has_pods = |set: &Arc<Value>| !view.controlled(set, "pods").is_empty();
        if !running.is_empty() || self.old.iter().any(|set| has_pods(set)) {
            return running;
        }
        match self.new {
            None => vec![self.new_set(self.wanted)],
            Some(new) if replicas(new) != self.wanted => vec![Self::scale(new, self.wanted)],
            Some(_) => Vec::new(),
        }
    }

    /// Only the number of pods, not their version.
    fn scale_paused(&self) -> Vec<Write> {
        match self.sets().filter(|set| replicas(set) > 0).last() {
            Some(set)
                if self
                    .old
                    .iter()
                    .all(|o| name(o) == name(set) || replicas(o) == 0) =>
            {
                if replicas(set) == self.wanted {
                    Vec::new()
                } else {
                    vec![Self::scale(set, self.wanted)]
                }
            }
            _ => Vec::new(),
        }
    }

    /// Empty sets beyond those that are kept to go back to.
    fn outdated(&self) -> Vec<Write> {
        let keep = number(self.deployment, "/spec/revisionHistoryLimit").unwrap_or(10);
        let empty: Vec<&Arc<Value>> = self
            .old
            .iter()
            .copied()
            .filter(|set| replicas(set) == 0 && status_count(set, "replicas") == 0)
            .collect();
        let excess = empty
            .len()
            .saturating_sub(usize::try_from(keep).unwrap_or(0));
        empty
            .into_iter()
            .take(excess)
            .map(|set| {
                let key = super::super::object::key(&resource("apps", "replicasets"), set);
                Write::delete(&key, set)
            })
            .collect()
    }

    fn sum(&self, field: &str) -> i64 {
        self.sets().map(|set| status_count(set, field)).sum()
    }
}

/// One step of a `Deployment`.
pub(crate) fn step(view: &View, key: &Key, deployment: &Value, clock: &Clock) -> Outcome {
    let rollout = Rollout::read(view, deployment);
    let (status, wake) = status(&rollout, clock);
    let mut object = deployment.clone();
    object["status"] = status;
    if rollout.new.is_some() || !is_paused(deployment) {
        let current = rollout
            .new
            .map_or_else(|| rollout.newest_revision(), |new| revision(new).max(1));
        object["metadata"]["annotations"][REVISION] = current.to_string().into();
    }
    let mut outcome = Outcome::default();
    if object != *deployment {
        outcome.writes.push(Write::update(key, object));
    }
    outcome.wake = wake;
    if view.is_open(namespace(deployment)) {
        outcome.writes.extend(changes(view, &rollout));
    }
    outcome
}

fn is_paused(deployment: &Value) -> bool {
    deployment.pointer("/spec/paused").and_then(Value::as_bool) == Some(true)
}

fn changes(view: &View, rollout: &Rollout<'_>) -> Vec<Write> {
    let deployment = rollout.deployment;
    if is_paused(deployment) {
        return rollout.scale_paused();
    }
    // A version that comes back is the newest one again.
    if let Some(new) = rollout.new
        && revision(new) < rollout.newest_revision()
        && rollout.old.iter().any(|set| revision(set) > revision(new))
    {
        let mut object = (**new).clone();
        object["metadata"]["annotations"][REVISION] = rollout.newest_revision().to_string().into();
        let key = super::super::object::key(&resource("apps", "replicasets"), new);
        return vec![Write::update(&key, object)];
    }
    let writes = if text(deployment, "/spec/strategy/type") == "Recreate" {
        rollout.recreate(view)
    } else {
        rollout.roll()
    };
    if writes.is_empty() {
        rollout.outdated()
    } else {
        writes
    }
}

fn status(rollout: &Rollout<'_>, clock: &Clock) -> (Value, Option<Timestamp>) {
    let deployment = rollout.deployment;
    let total = rollout.sum("replicas");
    let available = rollout.sum("availableReplicas");
    let updated = rollout.new.map_or(0, |new| status_count(new, "replicas"));
    let mut status = counts(&[
        ("replicas", total),
        ("updatedReplicas", updated),
        ("readyReplicas", rollout.sum("readyReplicas")),
        ("availableReplicas", available),
        ("unavailableReplicas", (rollout.wanted - available).max(0)),
    ]);
    status["observedGeneration"] = number(deployment, "/metadata/generation")
        .unwrap_or(0)
        .into();
    let is_available = available >= rollout.wanted - rollout.unavailable;
    let (reason, message) = if is_available {
        (
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
        )
    } else {
        (
            "MinimumReplicasUnavailable",
            "Deployment does not have minimum availability.",
        )
    };
    let mut available_condition = next_condition(
        deployment,
        "Available",
        is_available,
        reason,
        message,
        &clock.text,
    );
    let same = condition(deployment, "Available")
        .filter(|before| text(before, "/status") == text(&available_condition, "/status"));
    available_condition["lastUpdateTime"] = same
        .map_or(clock.text.as_str(), |before| {
            text(before, "/lastUpdateTime")
        })
        .into();
    let complete = updated == rollout.wanted && total == updated && available == rollout.wanted;
    let (progressing, wake) = progressing(rollout, &status, complete, clock);
    status["conditions"] = json!([available_condition, progressing]);
    (status, wake)
}

/// Whether it gets on, or has taken longer than it may.
fn progressing(
    rollout: &Rollout<'_>,
    status: &Value,
    complete: bool,
    clock: &Clock,
) -> (Value, Option<Timestamp>) {
    let deployment = rollout.deployment;
    let set = rollout.new.map_or("", |new| name(new));
    let before = condition(deployment, "Progressing");
    if complete {
        let message = format!("ReplicaSet \"{set}\" has successfully progressed.");
        let mut next = next_condition(
            deployment,
            "Progressing",
            true,
            "NewReplicaSetAvailable",
            &message,
            &clock.text,
        );
        let known = before.filter(|before| text(before, "/message") == message);
        next["lastUpdateTime"] = known
            .map_or(clock.text.as_str(), |before| {
                text(before, "/lastUpdateTime")
            })
            .into();
        return (next, None);
    }
    let counted = [
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "observedGeneration",
    ];
    let moved = counted
        .iter()
        .any(|field| status.get(field) != deployment.pointer(&format!("/status/{field}")));
    let since = before
        .filter(|_| !moved)
        .map_or(clock.text.as_str(), |before| {
            text(before, "/lastUpdateTime")
        });
    let limit = number(deployment, "/spec/progressDeadlineSeconds").unwrap_or(600);
    let limit = Duration::from_secs(u64::try_from(limit).unwrap_or(0));
    let deadline = clock.after(since.parse().unwrap_or(clock.now), limit);
    let late = clock.now >= deadline && !is_paused(deployment);
    let (reason, message) = if late {
        (
            "ProgressDeadlineExceeded",
            format!("ReplicaSet \"{set}\" has timed out progressing."),
        )
    } else if rollout.new.is_none() {
        ("NewReplicaSetCreated", "Created new replica set".to_owned())
    } else {
        (
            "ReplicaSetUpdated",
            format!("ReplicaSet \"{set}\" is progressing."),
        )
    };
    let mut next = next_condition(
        deployment,
        "Progressing",
        !late,
        reason,
        &message,
        &clock.text,
    );
    next["lastUpdateTime"] = since.into();
    (next, (!late).then_some(deadline))
}

#[cfg(test)]
mod tests {
    use super::super::super::object::{is_true, list};
    use super::super::pods::FAIL_ANNOTATION;
    use super::super::tests::{World, template, workload};
    use super::*;

    /// Whether a deployment's newest version is completely there.
    fn is_complete(deployment: &Value) -> bool {
        condition(deployment, "Progressing")
            .is_some_and(|condition| text(condition, "/reason") == "NewReplicaSetAvailable")
            && is_true(deployment, "Available")
            && list(deployment, "/status/conditions").len() == 2
    }

    fn started(replicas: i64) -> (World, Key) {
        let mut world = World::new("64", 100);
        let object = workload("Deployment", replicas, &template("web", json!({}), "100m"));
        let key = world.create("apps", "deployments", object);
        world.run_quietly();
        (world, key)
    }

    fn set_image(world: &mut World, key: &Key, image: &str) {
        world.edit(key, |deployment| {
            deployment["spec"]["template"]["spec"]["containers"][0]["image"] = image.into();
        });
    }

    #[test]
    fn a_deployment_becomes_ready_and_says_so() {
        let (world, key) = started(3);
        let deployment = world.object(&key);
        assert!(is_complete(deployment), "{deployment}");
        assert_eq!(deployment["status"]["availableReplicas"], 3);
        assert_eq!(deployment["status"]["observedGeneration"], 1);
        assert_eq!(annotation(deployment, REVISION), Some("1"));
    }

    #[test]
    fn a_new_version_never_falls_below_what_must_be_available() {
        let (mut world, key) = started(4);
        set_image(&mut world, &key, "x:2");
        world.run(Duration::from_secs(10), &mut |world| {
            assert!(world.ready_pods() >= 3);
            assert!(world.pods().len() <= 5);
        });
        let deployment = world.object(&key);
        assert!(is_complete(deployment), "{deployment}");
        assert_eq!(annotation(deployment, REVISION), Some("2"));
        let images: Vec<&str> = world
            .pods()
            .into_iter()
            .map(|pod| text(pod, "/spec/containers/0/image"))
            .collect();
        assert_eq!(images, ["x:2"; 4]);
    }

    #[test]
    fn going_back_uses_the_old_set_with_a_new_number() {
        let (mut world, key) = started(2);
        set_image(&mut world, &key, "x:2");
        world.run_quietly();
        set_image(&mut world, &key, "x:1");
        world.run_quietly();
        assert!(is_complete(world.object(&key)));
        let sets = resource("apps", "replicasets");
        assert_eq!(world.view.all(&sets).count(), 2);
        assert_eq!(annotation(world.object(&key), REVISION), Some("3"));
    }

    #[test]
    fn a_version_that_fails_leaves_the_old_one_and_is_late_in_the_end() {
        let (mut world, key) = started(2);
        world.edit(&key, |deployment| {
            deployment["spec"]["progressDeadlineSeconds"] = 5.into();
            deployment["spec"]["template"]["metadata"]["annotations"] =
                json!({FAIL_ANNOTATION: "CrashLoopBackOff"});
        });
        world.run(Duration::from_secs(3), &mut |world| {
            assert!(world.ready_pods() >= 2);
        });
        let reason = |world: &World| {
            let condition = condition(world.object(&key), "Progressing").unwrap();
            text(condition, "/reason").to_owned()
        };
        assert_eq!(reason(&world), "ReplicaSetUpdated");
        world.run_quietly();
        assert_eq!(reason(&world), "ProgressDeadlineExceeded");
        assert_eq!(world.ready_pods(), 2);
    }

    #[test]
    fn recreate_ends_the_old_before_it_starts_the_new() {
        let (mut world, key) = started(2);
        world.edit(&key, |deployment| {
            deployment["spec"]["strategy"] = json!({"type": "Recreate"});
        });
        set_image(&mut world, &key, "x:2");
        world.run(Duration::from_secs(10), &mut |world| {
            let mut images: Vec<&str> = world
                .pods()
                .into_iter()
                .map(|pod| text(pod, "/spec/containers/0/image"))
                .collect();
            images.dedup();
            assert!(images.len() <= 1, "{images:?}");
        });
        assert!(is_complete(world.object(&key)));
    }

    #[test]
    fn scaling_and_pausing_do_what_they_say() {
        let (mut world, key) = started(2);
        world.edit(&key, |deployment| deployment["spec"]["replicas"] = 5.into());
        world.run_quietly();
        assert_eq!(world.ready_pods(), 5);
        world.edit(&key, |deployment| {
            deployment["spec"]["paused"] = true.into();
            deployment["spec"]["replicas"] = 3.into();
        });
        set_image(&mut world, &key, "x:2");
        world.run_quietly();
        assert_eq!(world.ready_pods(), 3);
        assert!(
            world
                .pods()
                .iter()
                .all(|pod| text(pod, "/spec/containers/0/image") == "x:1")
        );
        world.edit(&key, |deployment| deployment["spec"]["replicas"] = 0.into());
        world.run_quietly();
        assert_eq!(world.pods().len(), 0);
    }
}

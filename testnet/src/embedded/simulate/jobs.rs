//! `Job`: runs pods until enough of them have succeeded.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::object::{
    Key, is_dying, is_true, label, name, namespace, next_condition, number, resource, text, uid,
};
use super::super::view::View;
use super::sets::{counts, pod_key};
use super::{Clock, Outcome, Write, pod_of, pods, with_status};

/// One step of a `Job`.
pub(crate) fn step(view: &View, key: &Key, job: &Arc<Value>, clock: &Clock) -> Outcome {
    if is_true(job, "Complete") || is_true(job, "Failed") {
        return expire(key, job, clock);
    }
    let pods = view.controlled(job, "pods");
    let count = |phase: &str| {
        pods.iter()
            .filter(|pod| text(pod, "/status/phase") == phase)
            .count() as i64
    };
    let (succeeded, failed) = (count("Succeeded"), count("Failed"));
    let active: Vec<&&Arc<Value>> = pods
        .iter()
        .filter(|pod| !is_dying(pod) && !pods::is_finished(pod))
        .collect();
    let parallel = number(job, "/spec/parallelism").unwrap_or(1).max(0);
    // Without a number, one success is enough.
    let wanted = number(job, "/spec/completions").unwrap_or(1).max(0);
    let limit = number(job, "/spec/backoffLimit").unwrap_or(6);
    let suspended = job.pointer("/spec/suspend").and_then(Value::as_bool) == Some(true);
    let done = succeeded >= wanted;
    let broken = failed > limit;
    let mut writes = Vec::new();
    let running = if done || broken || suspended {
        writes.extend(active.iter().map(|pod| Write::delete(&pod_key(pod), pod)));
        0
    } else {
        let target = parallel.min(wanted - succeeded);
        let missing = (target - active.len() as i64).max(0);
        if view.is_open(namespace(job)) {
            let pod = new_pod(job);
            writes.extend((0..missing).map(|_| Write::Create {
                resource: resource("", "pods"),
                object: pod.clone(),
            }));
        }
        active.len() as i64
    };
    let ready = active.iter().filter(|pod| is_true(pod, "Ready")).count() as i64;
    let mut status = counts(&[
        ("active", running),
        ("ready", ready.min(running)),
        ("succeeded", succeeded),
        ("failed", failed),
    ]);
    let started = text(job, "/status/startTime");
    if !suspended {
        status["startTime"] = if started.is_empty() {
            &clock.text
        } else {
            started
        }
        .into();
    }
    let condition = |kind: &str, reason: &str, message: &str| {
        json!([next_condition(
            job,
            kind,
            true,
            reason,
            message,
            &clock.text
        )])
    };
    if done {
        status["completionTime"] = clock.text.clone().into();
        status["conditions"] = condition(
            "Complete",
            "CompletionsReached",
            "Reached expected number of succeeded pods",
        );
    } else if broken {
        status["conditions"] = condition(
            "Failed",
            "BackoffLimitExceeded",
            "Job has reached the specified backoff limit",
        );
    } else if suspended {
        status["conditions"] = condition("Suspended", "JobSuspended", "Job suspended");
    }
    let mut outcome = with_status(key, job, status);
    outcome.writes.extend(writes);
    outcome
}

fn new_pod(job: &Value) -> Value {
    let template = job.pointer("/spec/template").cloned().unwrap_or_default();
    let labels = [
        ("batch.kubernetes.io/job-name", name(job)),
        ("batch.kubernetes.io/controller-uid", uid(job)),
        ("job-name", name(job)),
    ];
    let mut pod = pod_of(job, &template, &labels);
    pod["metadata"]["generateName"] = format!("{}-", name(job)).into();
    debug_assert!(label(&pod, "job-name").is_some());
    pod
}

/// A finished job goes when its time is over.
fn expire(key: &Key, job: &Arc<Value>, clock: &Clock) -> Outcome {
    let Some(seconds) = number(job, "/spec/ttlSecondsAfterFinished") else {
        return Outcome::default();
    };
    let finished = ["Complete", "Failed"]
        .into_iter()
        .find_map(|kind| super::super::object::condition(job, kind))
        .and_then(|condition| text(condition, "/lastTransitionTime").parse().ok())
        .unwrap_or(clock.now);
    let over = clock.after(
        finished,
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
    );
    if clock.now >= over {
        return Outcome::write(Write::delete(key, job));
    }
    let mut outcome = Outcome::default();
    outcome.wake_at(over);
    outcome
}

#[cfg(test)]
mod tests {
    use super::super::pods::FAIL_ANNOTATION;
    use super::super::tests::{World, template};
    use super::*;

    fn job(annotations: Value, more: Value) -> Value {
        let mut template = template("job", annotations, "100m");
        template["spec"]["restartPolicy"] = "Never".into();
        let mut spec = json!({"template": template, "backoffLimit": 2});
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job", "namespace": "default"}, "spec": spec})
    }

    #[test]
    fn a_job_completes_with_as_many_pods_as_it_wants() {
        let mut world = World::new("8", 20);
        let key = world.create(
            "batch",
            "jobs",
            job(json!({}), json!({"completions": 3, "parallelism": 2})),
        );
        world.run(Duration::from_secs(10), &mut |world| {
            let running = world
                .pods()
                .iter()
                .filter(|pod| !pods::is_finished(pod))
                .count();
            assert!(running <= 2);
        });
        let job = world.object(&key);
        assert!(is_true(job, "Complete"), "{job}");
        assert_eq!(job["status"]["succeeded"], 3);
    }

    #[test]
    fn a_job_that_fails_too_often_says_so() {
        let mut world = World::new("8", 20);
        let key = world.create(
            "batch",
            "jobs",
            job(json!({FAIL_ANNOTATION: "Error"}), json!({})),
        );
        world.run_quietly();
        let job = world.object(&key);
        assert!(is_true(job, "Failed"), "{job}");
        assert_eq!(job["status"]["failed"], 3);
    }

    #[test]
    fn a_finished_job_goes_after_its_time() {
        let mut world = World::new("8", 20);
        let key = world.create(
            "batch",
            "jobs",
            job(json!({}), json!({"ttlSecondsAfterFinished": 5})),
        );
        world.run(Duration::from_secs(2), &mut |_| {});
        assert!(is_true(world.object(&key), "Complete"));
        world.run_quietly();
        assert!(world.view.get(&key).is_none());
    }
}
